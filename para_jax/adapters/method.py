"""The record of an adapter method: its names, how an AdapterBank pads it, and how its folder is written and read.

What a method computes is its Adapter class. The rest of the package asks the record and never which method it has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from jax.typing import ArrayLike

from ..config import ModelConfig
from .adapter import Adapter, Backbone
from .formats.own import ValueCounts, count_by_shape, leaves_of_tensors, tensors_of_leaves
from .scope import scope_of

Shapes = dict[str, tuple[int, ...]]


def at_sites(config: Any, sites: tuple[str, ...], max_r: int) -> Any:
    return replace(config, target_modules=sites)


def vectors_on_sites(config: Any) -> str:
    return f"Vectors on {', '.join(config.target_modules)}"


def acts_everywhere(config: Any) -> bool:
    return scope_of(config)[0] == "all"


@dataclass(frozen=True, kw_only=True)
class Method:
    """An adapter method. The fields without a default are needed; the defaults suit a method whose adapters hold one
    vector for each site, in a folder of para_jax's own format."""

    name: str
    """the value of `adapter.method` in a run's config, and of AdapterBank's `methods`"""
    label: str
    """the name in text, such as (IA)^3"""
    peft_type: str
    """the value of `peft_type` in adapter_config.json"""
    config: type
    """a frozen dataclass; every field has a default, and `target_modules` names the sites"""
    adapter: type[Adapter]
    carries: str = "factors"
    """what decode carries for each row: "factors" if condition() returns Factors, else any noun, such as "matrices" """

    doubt: Callable[[Any, ModelConfig, float], str | None] = lambda config, model, rate: None
    """(config, backbone, learning rate) -> why such a run may learn little, and what to set instead"""

    # In the rows of an AdapterBank, adapters are padded to the bank's rank and sites, so that they stack.
    rank: Callable[[Any], int] = lambda config: 1
    """(config) -> the rank; 1 for a method without one"""
    group_config: Callable[[Any, tuple[str, ...], int], Any] = at_sites
    """(config of a `normal` adapter, the bank's sites, the bank's largest rank) -> the config after padding"""

    # In an adapter folder.
    outline: Callable[[Any], str] = vectors_on_sites
    """(config) -> a sentence without its full stop, for the model card"""
    to_tensors: Callable[[Adapter], Mapping[str, ArrayLike]] = tensors_of_leaves
    """(adapter) -> the file's tensors by name"""
    from_tensors: Callable[[Any, ModelConfig, dict], tuple[Any, dict]] = leaves_of_tensors
    """(config, backbone, tensors) -> the config and the arrays of the adapter, by the names of `named_leaves`"""
    tensor_shapes: Callable[[Any, ModelConfig], Shapes] | None = None
    """(config in the file, backbone) -> the expected shapes; None: those that `to_tensors` gives"""
    count_values: Callable[[Any, dict, Callable[[], Shapes]], tuple[int, int, int] | ValueCounts] = count_by_shape
    """(config, backbone in the file, a function that reads the shapes of the file's tensors) -> how many numbers are in
    matrices, how many in vectors, and how many decode carries for each row; ValueCounts can say more"""
    to_peft_config: Callable[[Any, Backbone], dict] | None = None
    """(config, backbone) -> the method's own keys in adapter_config.json, for a method that PEFT knows. None: the
    config's fields are the keys, next to a description of the backbone."""
    from_peft_config: Callable[[dict, Shapes], Any] | None = None
    """(adapter_config.json, shapes of the file's tensors) -> config, for a method that PEFT knows"""
    fits_peft: Callable[[Any], bool] = acts_everywhere
    """(config) -> whether PEFT's format can say all of it, for a method that PEFT knows. If it can't, the folder is in
    our own format"""

    @property
    def in_peft(self) -> bool:
        """Whether Hugging Face PEFT defines the folder's format, and so can load it."""
        return self.to_peft_config is not None

    @property
    def forms(self) -> tuple[Method, ...]:
        """The method once for each format that its folders may have: PEFT's, if it knows the method, and our own."""
        return (self, self.in_own_format) if self.in_peft else (self,)

    def form_of(self, config: Any) -> Method:
        """The method with the format of this config's folder."""
        return self if not self.in_peft or self.fits_peft(config) else self.in_own_format

    @property
    def in_own_format(self) -> Method:
        """The method with folders in our own format. Both the `peft_type` and the names of the tensors are unknown to
        PEFT and libraries like it, so none of them loads such a folder and applies the adapter where it must not
        act."""
        return replace(
            self,
            peft_type=f"PARA_JAX_{self.peft_type}",
            to_peft_config=None,
            from_peft_config=None,
            to_tensors=tensors_of_leaves,
            from_tensors=leaves_of_tensors,
            tensor_shapes=None,
        )


def require_peft_fits(name: str, method: Method, config: Any) -> None:
    """Raises ValueError, which says what PEFT's format lacks, for an adapter that it can't hold.

    Args:
        name: what the error is about.
        method: as `form_of` gives it for this config.
    """
    if method.in_peft:
        return
    if acts_everywhere(config):
        raise ValueError(f"{name}: {method.label} has no format that PEFT knows")
    advice = "use the adapter with para_jax, or train it with adapter.scope=all"
    if config.scope == "response" and hasattr(config, "alora_invocation_tokens"):
        advice += ". If every prompt ends with the same tokens, train it with adapter.alora_invocation_tokens"
    raise ValueError(
        f"{name}: PEFT's format has no scope {config.scope} for this {method.label} adapter, and PEFT would apply it "
        f"at every token\n{advice}"
    )
