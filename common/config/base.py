"""What every section of a configuration is made of."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Dtype = Literal["auto", "float32", "bfloat16"]
"""`auto`: bfloat16 on a GPU, float32 on CPU."""


class ConfigError(ValueError):
    """One line that names the key, the value and what would be valid."""


class Section(BaseModel):
    """Base of every section: closed and immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
