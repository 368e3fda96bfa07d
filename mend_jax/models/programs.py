"""Programs of a model: compiled once for all models that differ in their weights alone, and without keeping any of them.

`jax.jit` keeps its static arguments as long as the process lives. With a model among them its weights would never be freed, and the
same model read again would be compiled again.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable

import jax
import numpy as np

NOT_TRACED = ("tokenizer", "path", "folder")  # fields of a model that no program depends on
PARAMS = "params"


class Shell:
    """A model (an LLM or a kind of prefix, a dataclass) with the shapes of its weights in their place; equal to that of another with
    the same settings and shapes."""

    def __init__(self, model):
        self.model = _emptied(model)
        self.key = _key(self.model)

    def __eq__(self, other) -> bool:
        return isinstance(other, Shell) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


_shells: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def program(
    function: Callable | None = None, *, static: tuple[int, ...] = (), donate: tuple[int, ...] = ()
) -> Callable:
    """`jax.jit` of function(model, *arguments), which is given the model with shapes as `params`: they are one of the arguments.

    Args:
        function: what is compiled; None: the decorator of given options.
        static: the positions of arguments that are static too, hashed by value, counted from the model's, 0.
        donate: the positions of arguments whose buffers may be overwritten.
    """
    if function is None:
        return functools.partial(program, static=static, donate=donate)

    @functools.partial(jax.jit, static_argnums=(0, *static), donate_argnums=donate)
    @functools.wraps(function)
    def compiled(shell, *arguments):
        return function(shell.model, *arguments)

    @functools.wraps(function)
    def call(model, *arguments):
        if model not in _shells:
            _shells[model] = Shell(model)
        return compiled(_shells[model], *arguments)

    call._cache_size = compiled._cache_size  # as of what jax.jit makes
    return call


def _is_model(value) -> bool:
    return dataclasses.is_dataclass(value) and hasattr(value, PARAMS)


def _emptied(model):
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    changed = {name: None for name in NOT_TRACED if name in fields}
    if PARAMS in fields:
        changed[PARAMS] = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), fields[PARAMS])
    changed |= {name: _emptied(value) for name, value in fields.items() if name not in changed and _is_model(value)}
    return dataclasses.replace(model, **changed)


def _key(model) -> tuple:
    fields = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    shapes, tree = jax.tree.flatten(fields.pop(PARAMS, None))
    return type(model), tree, *shapes, *(_key(value) if _is_model(value) else value for value in fields.values())
