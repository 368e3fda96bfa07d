"""The rows of training data, each a pure function of (seed, row number); one class per stage.

Each class has `lengths(row) -> (context tokens, tokens of each query)`, which is cheap, for planning; `tokens(row) -> (demos,
queries, teacher_demos or None)`, where a query is (tokens, target_start); `describe(row)`, where the row came from; the padded
sizes `demo_buckets` and `query_buckets`; whether its `counted(row)` says which tokens are predicted (`counts_outputs`); and, for LLMs that read x and y separately, `input_columns`, the longest x, and
`target_length(row)`.

If the distiller has another tokenizer than the LLM, or reads in chunks (`separate_teacher`), `demos` are as the distiller reads
them, and `teacher_demos` are the `teacher_length(row)` LLM tokens of the same text; everything else is in the LLM's tokens.
"""
