"""Stock PyTorch hooks that are certain to come off again."""

import contextlib


@contextlib.contextmanager
def hooked(forward=(), before=()):
    """Within the block, (module, hook) pairs are registered: `forward` hooks are called as
    (module, args, kwargs, output), `before` hooks as (module, args, kwargs); what they return replaces it."""
    handles = [module.register_forward_hook(hook, with_kwargs=True) for module, hook in forward]
    handles += [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in before]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
