"""Two hundred requests at once, mixed, with clients that go away and failures: nothing is lost, nothing mixed up."""

import asyncio
import base64
import io
import random

import httpx
import numpy as np
import pytest
from PIL import Image

REQUESTS, ABREAST = 200, 32
WORDS = ("zero", "one", "two", "three", "seven")


def kind(number):
    """The body of a request: few steps, many steps, guided, several images; every combination comes again."""
    body = {"prompt": f"a handwritten {WORDS[number % 5]}", "seed": number % 2, "n": 1 + (number % 10 == 3)}
    steps = (4, 1, 2, 8)[number % 4]
    if steps != 4:
        body |= {"num_inference_steps": steps, "sampler": "ddim"}
    if number % 4 == 3:
        body["guidance_scale"] = 2.0
    return body


class Failing:
    """An engine that fails at random calls, and at every one of a moment."""

    def __init__(self, engine):
        self.engine, self.calls, self.failed = engine, 0, 0

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def __call__(self, **feeds):
        self.calls += 1
        # A call that fails is made again image by image, so two or more in a row are needed to lose one.
        if self.calls % 40 in (0, 1, 2):
            self.failed += 1
            raise RuntimeError("injected")
        return self.engine(**feeds)


@pytest.mark.timeout(300)
def test_two_hundred_requests(make_worker, listening):
    from accel.serving.limits import Limits
    from accel.serving.metrics import Metrics

    limits, metrics = Limits(queue=2 * ABREAST), Metrics()
    worker = make_worker(limits=limits, observer=metrics)
    references = {}
    outcomes = {}
    drop = random.Random(0).sample(range(REQUESTS), 20)

    async def one(client, gate, number):
        async with gate:
            body = kind(number)
            try:
                wait = 0.02 if number in drop else 60
                answer = await client.post("/v1/images/generations", json=body, timeout=wait)
            except httpx.TimeoutException:
                outcomes[number] = "gone"
                return
            if answer.status_code != 200:
                outcomes[number] = answer.status_code
                return
            data = answer.json()["data"]
            assert len(data) == body["n"]
            for i, image in enumerate(data):
                assert image["seed"] == body["seed"] + i
                key = str({**body, "seed": image["seed"], "n": 1})
                pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["b64_json"]))))
                references.setdefault(key, []).append(pixels)
            outcomes[number] = 200

    async def all_of_them(url):
        gate = asyncio.Semaphore(ABREAST)
        async with httpx.AsyncClient(base_url=url, limits=httpx.Limits(max_connections=ABREAST)) as client:
            await asyncio.gather(*(one(client, gate, number) for number in range(REQUESTS)))

    with listening([worker], metrics, limits=limits) as url:
        engines = worker.pipeline.engines
        engines._loaded["unet"] = failing = Failing(engines["unet"])
        asyncio.run(all_of_them(url))
        counts = {state: list(outcomes.values()).count(state) for state in set(outcomes.values())}
        assert sum(counts.values()) == REQUESTS and set(counts) <= {200, 500, "gone"}, counts
        assert counts[200] > 130 and counts["gone"] <= 20 and failing.failed >= 6
        numbers = httpx.get(f"{url}/metrics").text
        assert f'accel_queue_depth{{model="{worker.name}"}} 0.0' in numbers and not worker.orders
        engines._loaded["unet"] = failing.engine
    # The same request has the same image whenever it was made, and other requests have other images.
    firsts = []
    for key, found in references.items():
        assert all(np.array_equal(found[0], other) for other in found[1:]), key
        firsts.append(found[0].tobytes())
    assert len(set(firsts)) == len(firsts) > 20
