"""Registry: names, options, nearest matches, plugins."""

import pytest
import torch

from fedfstq_hf.codec import Encoded, SparseUpdate, codec_names, get_codec, register
from fedfstq_hf.codec import codec as registry
from fedfstq_hf.errors import ConfigError


def test_names_are_sorted_and_all_construct():
    assert codec_names() == sorted(codec_names())
    assert {"fp16", "fp32", "fstq", "paper"} <= set(codec_names())
    for name in ("fp16", "fp32", "fstq", "paper"):
        assert get_codec(name).name == name


def test_unknown_codec_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'fstk'.*did you mean 'fstq'"):
        get_codec("fstk")


def test_unknown_option_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'bist'.*did you mean 'bits'.*fisher_weighted"):
        get_codec("fstq", bist=1)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fstq", {"bits": 0}),
        ("fstq", {"bits": "much"}),
        ("paper", {"shares": (0.5, 0.6, 0.1)}),
        ("paper", {"shares": (0.5,)}),
    ],
)
def test_option_values_are_checked(name, options):
    with pytest.raises(ConfigError, match=f"{name} {next(iter(options))}"):
        get_codec(name, **options)


def test_a_plugin_can_be_registered_but_not_shadow_another(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))

    @register("null")
    class Null:
        name = "null"
        unbiased = False

        def encode(self, delta, fisher=None, *, max_bytes=None, context=None):
            return Encoded(b"", SparseUpdate(0, None, torch.zeros(0)))

    assert get_codec("null").encode({}).payload == b""
    assert "null" in codec_names()
    with pytest.raises(ConfigError, match="already registered"):
        register("null")(lambda: None)


def test_unbiased_are_those_whose_mean_over_seeds_is_the_update():
    # fedbat within plus or minus its step size; what is lossless is unbiased too
    assert [name for name in codec_names() if get_codec(name).unbiased] == ["fedbat", "fedpaq", "fp32", "fstq", "qsgd"]
