"""What each row of training data is: a pure function of (seed, row number), one class per stage.

Each has `lengths(row) -> (context tokens, tokens of each query)`, cheap, for planning; `tokens(row) -> (demos, queries,
teacher_demos or None)`, a query being (tokens, target_start); `describe(row)`, where it came from; the padded sizes
`demo_buckets`, `query_buckets`; and for LLMs that read x and y apart `input_columns`, the longest x, and
`target_length(row)`.

Where the distiller has another tokenizer than the LLM, or reads in chunks (`separate_teacher`), `demos` are as the distiller reads
them and `teacher_demos` the LLM's tokens of the very same text, `teacher_length(row)` many; everything else is in the LLM's tokens.
"""
