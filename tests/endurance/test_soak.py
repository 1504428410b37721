"""The soak's own judgement: it must notice what it looks for."""

import asyncio
import json
import os
import socket

import numpy as np
from processes import command, family, ports_of, pss, state
from soak import CANDIDATES, Found, Load

ONE, OTHER = np.linspace(0.1, 0.9, CANDIDATES), np.linspace(0.2, 0.8, CANDIDATES)


def answer(version, scores):
    order = np.argsort(-scores)
    body = json.dumps({"version": version, "ranking": order.tolist(), "scores": scores[order].tolist()})
    return f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode()


def judged(*answers, before=lambda load: None):
    """What a load finds of a server that gives these answers, None being none at all."""

    async def run():
        given = list(answers)

        async def serve(reader, writer):
            try:
                while given:
                    head = await reader.readuntil(b"\r\n\r\n")
                    await reader.readexactly(int(head.partition(b"Content-Length: ")[2].split()[0]))
                    found = given.pop(0)
                    if found is None:
                        break
                    writer.write(found)
            except asyncio.IncompleteReadError:
                pass
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        load = Load(server.sockets[0].getsockname()[1], [b"{}"] * 64, {"1": [ONE] * 64, "2": [OTHER] * 64})
        before(load)
        for number in range(len(answers)):
            await load.one(number, 0.0)
        server.close()
        return load.found

    return asyncio.run(run())


def test_answers_are_judged_by_the_version_that_they_name():
    found = judged(answer("1", ONE), answer("2", OTHER), answer("2", OTHER))
    assert (found.sent, dict(found.right), found.violations()) == (3, {"1": 1, "2": 2}, [])
    mixed = np.where(np.arange(CANDIDATES) < 10, ONE, OTHER)
    found = judged(answer("1", mixed), answer("1", OTHER), answer("1", ONE + 0.01), answer("3", ONE))
    assert (found.mixed, found.wrong, found.right.total()) == (3, 1, 0)
    assert found.violations() == ["1 wrong answers", "3 answers of mixed versions"]


def test_refusals_are_no_fault_and_other_errors_are():
    busy = b"HTTP/1.1 503 Busy\r\ncontent-length: 2\r\nConnection: close\r\n\r\n{}"
    found = judged(busy, busy.replace(b"503", b"500"), answer("1", ONE))
    assert (found.other_status, found.right["1"]) == ({503: 1, 500: 1}, 1)
    assert found.violations() == ["1 statuses other than 200 and 503"]


def test_lost_requests_are_the_killed_workers_own_or_a_fault():
    assert judged(None).violations() == ["1 lost beyond the killed workers' own"]
    found = judged(None, None, before=lambda load: load.in_hand.add(0))
    assert (found.lost_in_hand, found.lost_otherwise) == (1, 1)
    dying = ({0}, 0.0, float("inf"))
    found = judged(None, before=lambda load: setattr(load, "dying", dying))
    assert (found.lost_at_its_end, found.violations()) == (1, [])


def test_what_linux_tells_of_a_process():
    own = os.getpid()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as caller:
            connection, _ = server.accept()
            with connection:
                assert caller.getsockname()[1] in ports_of(own, port)
    assert state(own) in "RS"
    assert state(2**22) == ""
    assert own in family(own)
    assert "python" in command(own)
    assert pss(own) > 2**20
    assert Found().violations() == []
