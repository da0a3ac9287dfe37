"""The platform that a call is traced for, which decides how it is computed."""

import jax


def platform() -> str:
    """The platform: "cpu", "gpu" or "tpu".

    In this order: that of the abstract mesh, which compilation ahead of time names its chip with;
    that of `jax.default_device`; JAX's default. Arrays committed to another device are not looked
    at, because a traced function does not know them.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     platform()
        'cpu'
    """
    return current().platform


def kind() -> str:
    """The kind of device, as JAX names it, e.g. "NVIDIA H200"; looked for as the platform is.

    Example:
        >>> with jax.default_device(jax.devices("cpu")[0]):
        ...     kind()
        'cpu'
    """
    return current().device_kind


def on_cpu() -> bool:
    """Whether the platform is a CPU.

    Example:
        >>> on_cpu() == (platform() == "cpu")
        True
    """
    return platform() == "cpu"


def current() -> "jax.sharding.AbstractDevice | jax.Device":
    """The device itself, an abstract one where a program is compiled for another kind.

    Example:
        >>> current().device_kind == kind()
        True
    """
    # JAX 0.10 gives its configuration the attributes when it is imported.
    default = jax.config.jax_default_device  # type: ignore[attr-defined,unused-ignore]
    if default is None or isinstance(default, str):
        default = jax.local_devices(backend=default)[0]
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    # Under `shard_map` the mesh has an abstract device too, which knows nothing but its kind.
    if abstract is None or abstract.device_kind == default.device_kind:
        return default
    return abstract
