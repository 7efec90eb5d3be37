"""Stock PyTorch hooks that are certain to come off again."""

import contextlib


@contextlib.contextmanager
def hooked(forward=(), before=(), first=()):
    """Within the block, (module, hook) pairs are registered: `forward` hooks are called as
    (module, args, kwargs, output), `before` hooks as (module, args, kwargs); what they return replaces it. `first` are
    forward hooks that run before those that are there already."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in forward]
    handles += [module.register_forward_hook(hook, with_kwargs=True, prepend=True) for module, hook in first]
    handles += [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in before]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def on_streams(taps, functions):
    """A context manager in which functions[i](stream) is called at taps[i]; if it returns a tensor, that goes on."""
    pairs = list(zip(taps, functions, strict=True))
    return hooked(
        [(tap.module, _after(function)) for tap, function in pairs if tap.at == "output"],
        [(tap.module, _before(function)) for tap, function in pairs if tap.at == "input"],
    )


def _after(function):
    def hook(module, args, kwargs, output):
        stream, *rest = output if isinstance(output, tuple) else (output,)
        new = function(stream)
        if new is None:
            return None
        return (new, *rest) if isinstance(output, tuple) else new

    return hook


def _before(function):
    def hook(module, args, kwargs):
        if args:
            new = function(args[0])
            return None if new is None else ((new, *args[1:]), kwargs)
        new = function(kwargs["hidden_states"])
        return None if new is None else (args, {**kwargs, "hidden_states": new})

    return hook
