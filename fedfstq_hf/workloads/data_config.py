"""Where examples come from and how they become training text: the `data` section of recipes and client files."""

from dataclasses import dataclass, field

from fedfstq_hf.errors import ConfigError

FORMATS = ("demo", "fed_med", "fed_aya", "fed_code", "jsonl")


@dataclass(frozen=True)
class DataConfig:
    """One data set: a `.jsonl` file, a data set id on the Hub, or the embedded demo."""

    path: str = "demo"
    """A `.jsonl` file, a Hub data set (`org/name`), or `demo`."""
    format: str = "demo"
    """How columns become prompt, answer and topic: one of `FORMATS`."""
    subset: str | None = None
    """Configuration name of a Hub data set; not used for files."""
    columns: dict[str, str] = field(default_factory=dict)
    """Role -> column, where the data's names differ: `{prompt: inputs, answer: targets}`; dots reach deeper."""
    client_column: str | None = None
    """Column that names the owner of a row, for `federation.partition: natural`."""
    topic_column: str | None = None
    """Column to use as topic instead of the format's own (or of clusters of the text)."""
    topics: int = 8
    """Number of clusters, where topics are clustered from text."""
    max_length: int = 256
    """Tokens of prompt and answer together; a longer prompt loses its middle."""
    train_limit: int | None = None
    """At most so many training examples, drawn with a fixed seed; for the demo, how many are generated."""
    test_limit: int | None = None
    test_fraction: float = 0.1
    """Share of the groups held out where the data carry no split of their own."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ConfigError(f"format must be one of {', '.join(FORMATS)}, got {self.format!r}")
        if not self.path:
            raise ConfigError("path must name a .jsonl file, a Hub data set or demo, got an empty string")
        if (self.format == "demo") != (self.path == "demo"):
            raise ConfigError(f"path demo goes with format demo, got path {self.path!r} with format {self.format!r}")
        if self.max_length < 8:
            raise ConfigError(f"max_length must be at least 8 tokens, got {self.max_length}")
        if self.topics < 1:
            raise ConfigError(f"topics must be at least 1, got {self.topics}")
        for name in ("train_limit", "test_limit"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise ConfigError(f"{name} must be at least 1 or null, got {limit}")
        if not 0 < self.test_fraction < 1:
            raise ConfigError(f"test_fraction must lie in (0, 1), got {self.test_fraction}")
