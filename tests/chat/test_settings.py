"""`/set`: every name, what it refuses, and that a refused value changes nothing."""

import pytest

from lmtool.chat.settings import NAMES, Settings
from lmtool.config import GenerationConfig
from lmtool.errors import RequestError


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0.2", 0.2),
        ("top-k", "40", 40),
        ("--top_p", "0.9", 0.9),
        ("Seed", "7", 7),
        ("seed", "none", None),
        ("max_new_tokens", "none", None),
        ("stop", "###", ("###",)),
        ("stop", "none", ()),
    ],
)
def test_sampling_is_set(name: str, text: str, value: object) -> None:
    settings = Settings(GenerationConfig(seed=1, max_new_tokens=5, stop=("x",)))
    settings.set(name, text)
    assert getattr(settings.generation, name.lstrip("-").replace("-", "_").lower()) == value


def test_switches() -> None:
    settings = Settings()
    settings.set("think", "on")
    settings.set("markdown", "off")
    assert (settings.think, settings.markdown) == (True, False)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("temperature", "hot", "temperature is 'hot'; give a number"),
        ("temperature", "nan", "--temperature is nan"),
        ("top_k", "1.5", "top_k is '1.5'; give a whole number"),
        ("seed", "x", "seed is 'x'; give a whole number or none"),
        ("top_p", "2", "--top-p is 2.0"),
        ("think", "maybe", "think is 'maybe'; give on or off"),
        ("tempratur", "1", "did you mean 'temperature'"),
        ("zzz", "1", "settings are temperature, top_k"),
    ],
)
def test_bad_values_are_refused_by_name_and_change_nothing(name: str, text: str, message: str) -> None:
    settings = Settings()
    with pytest.raises(RequestError, match=message):
        settings.set(name, text)
    assert settings == Settings()


def test_every_setting_is_shown() -> None:
    assert [line.split()[0] for line in Settings().lines()] == list(NAMES)
