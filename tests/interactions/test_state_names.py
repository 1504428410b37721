"""Names of weights are an interface: a run that was trained must load in later versions.

After a change that is meant, and told in the changelog: ``python tests/interactions/test_state_names.py``.
"""

import json
from pathlib import Path

import pytest
from families.case import LAYOUT

from mldcn import interactions

COMMITTED = Path(__file__).parent / "state_names.json"


def state_names(name):
    return list(interactions.build({"name": name}, LAYOUT).state_dict())


@pytest.mark.parametrize("name", interactions.names())
def test_names_in_the_state_dict_are_those_of_before(name):
    assert json.loads(COMMITTED.read_text())[name] == state_names(name)


if __name__ == "__main__":
    lines = [f"{json.dumps(name)}: {json.dumps(state_names(name))}" for name in interactions.names()]
    COMMITTED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
