"""The extra arguments for vLLM: which of them would break the deployment, and what they say."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flexkv.launch.options import Options

_EVENTS = (
    "launch sets it: --gpu-events turns vLLM's own KV events on, without it flexkv's are the source"
)
_CONNECTOR = (
    "launch sets it: the default is vLLM's FlexKVConnectorV1, --own-connector takes flexkv's own "
    "class, --without-flexkv none"
)
_PLANES = "launch sets it, equally for every process: leave it out"
_NAMES = "set DYN_NAMESPACE instead, so that every process has it"

_OURS = {
    "--model": "give --model before the --",
    "--served-model-name": "give --served-model-name before the --",
    "--data-parallel-size": "give --data-parallel-size before the --",
    "-dp": "give --data-parallel-size before the --",
    "--kv-events-config": _EVENTS,
    "--kv-transfer-config": _CONNECTOR,
    "--no-enable-prefix-caching": "without prefix caching no block is ever kept: leave it out",
    "--discovery-backend": "launch sets it: --etcd or --with-etcd take etcd, else it is file",
    "--request-plane": _PLANES,
    "--namespace": _NAMES,
    "--endpoint": _NAMES,
    "--headless": "a worker of launch is whole: start headless nodes by hand",
}
_OWN_LAUNCH_ONLY = {"--kv-transfer-config"}  # vLLM's business where flexkv is left out


class Argument(NamedTuple):
    """One option among the extra arguments, its name with dashes."""

    name: str
    value: str | None
    text: str


def parsed(extra: tuple[str, ...]) -> list[Argument]:
    """The options of a command line of vLLM's, whose parser takes _ for - in names."""
    found = []
    for word, following in zip(extra, (*extra[1:], ""), strict=True):
        if not word.startswith("-") or _is_number(word):
            continue
        name, equals, value = word.partition("=")
        name = name.replace("_", "-").partition(".")[0]  # --kv-transfer-config.kv_role is one too
        if equals:
            found.append(Argument(name, value, word))
        elif following and (not following.startswith("-") or _is_number(following)):
            found.append(Argument(name, following, f"{word} {following}"))
        else:
            found.append(Argument(name, None, word))
    return found


def values_of(extra: tuple[str, ...]) -> dict[str, str | None]:
    """The last value of each option."""
    return {argument.name: argument.value for argument in parsed(extra)}


def argument_problems(options: Options, env: Mapping[str, str], block_size: int) -> list[str]:
    """What of the extra arguments and of Dynamo's variables can't be had, with remedies."""
    problems = []
    if options.extra and not options.extra[0].startswith("-"):
        problems.append(
            f"unexpected argument {options.extra[0]}: what comes after -- is for vLLM, and begins "
            "with a dash"
        )
    for argument in parsed(options.extra):
        if argument.name == "--connector":
            problems.append(f"{argument.text}: {_gone(argument.value)}")
        elif argument.name == "--event-plane" and argument.value != "nats":
            problems.append(f"{argument.text}: {_other_plane('an event plane', 'nats')}")
        elif argument.name == "--block-size" and argument.value != str(block_size):
            problems.append(
                f"{argument.text}: the router, flexkv and the other workers have blocks of "
                f"{block_size} tokens: give --block-size before the --"
            )
        elif argument.name in _OURS and not (
            options.without_flexkv and argument.name in _OWN_LAUNCH_ONLY
        ):
            problems.append(f"{argument.text}: {_OURS[argument.name]}")
    return problems + _variable_problems(env, block_size)


def _variable_problems(env: Mapping[str, str], block_size: int) -> list[str]:
    problems = []
    for name, wanted in (("DYN_EVENT_PLANE", "nats"), ("DYN_REQUEST_PLANE", "tcp")):
        if env.get(name) not in {None, "", wanted}:
            plane = name.removeprefix("DYN_").replace("_", " ").lower()
            problems.append(f"{name} is {env[name]}: {_other_plane(f'an {plane}', wanted)}")
    if "DYN_CONNECTOR" in env:
        problems.append(f"DYN_CONNECTOR is {env['DYN_CONNECTOR']!r}: {_gone(env['DYN_CONNECTOR'])}")
    if env.get("DYN_KV_CACHE_BLOCK_SIZE") not in {None, "", str(block_size)}:
        problems.append(
            f"DYN_KV_CACHE_BLOCK_SIZE is {env['DYN_KV_CACHE_BLOCK_SIZE']}, but blocks have "
            f"{block_size} tokens: unset it, or give --block-size"
        )
    return problems


def _gone(value: str | None) -> str:
    text = (
        "Dynamo's --connector is gone for vLLM (1.6.1 ends with an error); --kv-transfer-config "
        "has replaced it, and launch sets that: leave it out"
    )
    if value in {None, "", "flexkv", "none", "null"}:
        return text
    return f"{text}, or start the workers by hand for another connector"


def _other_plane(what: str, wanted: str) -> str:
    return (
        f"{what} that differs between processes means 0 % hits and no error; launch sets {wanted} "
        "for all: leave it out"
    ).replace("an request", "a request")


def _is_number(word: str) -> bool:
    return word[1:2].isdigit()
