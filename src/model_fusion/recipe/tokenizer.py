"""What a recipe may say about the output's tokenizer: its source, single tokens' embeddings, padding."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Zero(_Strict):
    """A row of zeros."""

    kind: Literal["zero"]


class ModelToken(_Strict):
    """The row of one token (or of one id) of one model."""

    kind: Literal["model_token"]
    model: str
    token: str | None = None
    token_id: int | None = None

    @model_validator(mode="after")
    def _one(self) -> "ModelToken":
        if (self.token is None) == (self.token_id is None):
            raise ValueError("a model_token has either `token` or `token_id`")
        return self


class TokenEmbedding(_Strict):
    """Where one token's embedding comes from: a model, zero, or another token's row. `force` replaces it even in
    the models that have the token."""

    source: str | Zero | ModelToken
    force: bool = False


class TokenizerSpec(_Strict):
    """`source` is base, union or a model; `tokens` are added where the source lacks them."""

    source: str = "base"
    tokens: dict[str, TokenEmbedding] = Field(default_factory=dict)
    pad_to_multiple_of: int | None = Field(default=None, ge=1)
