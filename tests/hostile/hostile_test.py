"""Every program in hostile environments and with hostile input: it works, or says why in one line.

A case passes with exit code 0, or with exit code 2 and one line that begins with "error: " at the
end of stderr, behind ordinary lines of progress. A traceback, a hang, another code: a defect.
"""

import os

import forked
import pytest
from environments import ENVIRONMENTS
from inputs import INPUTS
from place import Place

os.environ["OMP_NUM_THREADS"] = "1"  # no threads that a fork would lack


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    forked.preload()
    place = Place(tmp_path_factory.mktemp("place"))
    result = forked.run(
        "train",
        [*place.arguments("train"), f"--workdir={place.run}"],
        cwd=place.folder,
        env=place.environment(),
    )
    assert result.code == 0, result.stderr
    return place


def check(result: forked.Result) -> None:
    """Asserts that a program has worked, or has said why not as all of them do."""
    said = f"exit {result.code}\n{result.stderr[-3000:]}"
    assert not result.timed_out, f"hangs: {said}"
    assert "Traceback" not in result.stderr, said
    assert "Exception ignored" not in result.stderr, said
    assert result.code in (0, 2), said
    if result.code == 2:
        lines = result.stderr.splitlines()
        assert lines, "no word of what is wrong"
        assert lines[-1].startswith("error: "), said
        assert sum(line.startswith("error: ") for line in lines) == 1, said


@pytest.mark.parametrize("program", forked.PROGRAMS)
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_environment(name: str, program: str, place: Place) -> None:
    hostile = ENVIRONMENTS[name]
    env = place.environment()
    for variable, value in hostile.variables.items():
        if value is None:
            env.pop(variable, None)
        else:
            env[variable] = value
    check(
        forked.run(
            program,
            place.arguments(program),
            cwd=place.case(),
            env=env,
            setup=hostile.setup,
            closed=hostile.closed,
            encoding=hostile.encoding,
        )
    )


@pytest.mark.parametrize(
    ("program", "name"), [(program, name) for program in INPUTS for name in INPUTS[program]]
)
def test_input(program: str, name: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    case = place.case()
    monkeypatch.chdir(case)
    arguments = INPUTS[program][name](place)
    check(
        forked.run(
            program,
            [*place.arguments(program), *arguments],
            cwd=case,
            env=place.environment(),
        )
    )
