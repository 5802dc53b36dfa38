"""The thread that makes steps: the same images as a pipeline's, whatever else is being made."""

import threading
import time

import numpy as np
import pytest

from accel.errors import UserError
from accel.serving.batch import Shapes
from accel.serving.limits import Busy, Cancelled, Limits

PROMPTS = [f"a handwritten {word}" for word in ("zero", "one", "two", "three", "seven")]

MIXED = [
    dict(prompt=PROMPTS[0], seed=1),
    dict(prompt=PROMPTS[1], seed=2, steps=1),
    dict(prompt=PROMPTS[2], seed=3, sampler="dpmpp_2m", steps=9, guidance_scale=2.5),
    dict(prompt=PROMPTS[3], seed=4, sampler="euler_ancestral", steps=6),
    dict(prompt=PROMPTS[4], seed=5, sampler="ddim", steps=5, guidance_scale=1.5, negative_prompt="a handwritten one"),
    dict(prompt=PROMPTS[4], seed=6, num_images_per_prompt=3),
    dict(prompt=PROMPTS[2], seed=7, sampler="unipc", steps=7),
]


def pixels(images):
    return np.stack([np.asarray(image) for image in images])


def made(listener):
    assert listener.wait().error is None
    return pixels([listener.images[i] for i in sorted(listener.images)])


def expected(pipeline, call):
    """The pipeline's images, one by one; an int8 UNet is called with two rows or more, so a second image stands by."""
    images = []
    for i in range(call.get("num_images_per_prompt", 1)):
        seed = call["seed"] + i
        made = pipeline(**{**call, "seed": [seed, seed + 1000], "num_images_per_prompt": 2})
        images.append(made.images[0])
    return pixels(images)


def test_requests_of_every_kind_share_calls_and_get_the_pipelines_images(worker, pipeline, ask):
    sizes = []
    worker.observer.step = lambda model, rows, seconds: sizes.append(rows)
    listeners = [ask(worker, **call) for call in MIXED]
    for call, listener in zip(MIXED, listeners, strict=True):
        assert np.array_equal(made(listener), expected(pipeline, call)), call
    rows = [
        call.get("steps", 4) * (2 if call.get("guidance_scale", 0) > 1 else 1) * call.get("num_images_per_prompt", 1)
        for call in MIXED
    ]
    assert sum(sizes) == sum(rows) and max(sizes) == 8 and len(sizes) < sum(rows) / 3


def test_an_int8_image_has_the_same_bits_whatever_else_is_being_made(worker, ask):
    calls = [dict(prompt=PROMPTS[i % 5], seed=i) for i in range(6)]
    alone = [made(ask(worker, **call)) for call in calls]
    together = [ask(worker, **call) for call in [*calls, *MIXED]]
    for listener, one in zip(together, alone, strict=False):
        assert np.array_equal(made(listener), one)
    assert all(listener.wait().error is None for listener in together)


@pytest.mark.parametrize("model, engine", [("digits/tiny-4step", "eager"), ("digits/tiny-4step-int8", "openvino")])
def test_an_image_does_not_depend_on_its_neighbours(model, engine, make_worker, ask):
    """In calls of one shape it has the same bits; and it is within 1/255 of the image that is made alone."""
    call = dict(prompt=PROMPTS[4], seed=11)
    others = [dict(prompt=PROMPTS[i % 5], seed=20 + i, sampler="ddim", steps=3 + i) for i in range(4)]
    worker = make_worker(model, engine, shapes=Shapes(4, fixed=True))
    try:
        alone = made(ask(worker, **call))
        neighbours = [ask(worker, **other) for other in others[:2]]
        among = ask(worker, **call)
        neighbours += [ask(worker, **other) for other in others[2:]]
        assert np.array_equal(made(among), alone)
        assert all(listener.wait().error is None for listener in neighbours)
        single = pixels(worker.pipeline(**call).images)
        assert np.abs(single.astype(int) - alone).max() <= 1
    finally:
        worker.close(5)


class Faulty:
    """An engine that fails at every call that has the conditioning of one image in it."""

    def __init__(self, engine, poison):
        self.engine, self.poison, self.failed = engine, poison, 0

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def __call__(self, **feeds):
        if any(np.array_equal(row, self.poison) for row in feeds["encoder_hidden_states"]):
            self.failed += 1
            raise RuntimeError("injected")
        return self.engine(**feeds)


def test_a_failure_is_that_of_one_request(worker, pipeline, ask):
    bad = worker.pipeline.request({**defaults(), "prompt": "a handwritten nine", "seed": 0})
    from accel.pipeline.run import Run

    parts = (worker.pipeline.bundle, worker.pipeline.engines, worker.pipeline.tokenizers, worker.pipeline.schedule)
    poison = Run(*parts, bad).texts(bad.chunks[0])["encoder_hidden_states"][0]
    engines = worker.pipeline.engines
    engines._loaded["unet"] = faulty = Faulty(engines["unet"], poison)
    listeners = [ask(worker, prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
    broken = ask(worker, "a handwritten nine", num_images_per_prompt=2)
    listeners += [ask(worker, prompt, seed=9 + i) for i, prompt in enumerate(PROMPTS)]
    assert str(broken.wait().error) == "injected" and not broken.images and faulty.failed >= 2
    for i, listener in enumerate(listeners):
        seed = i if i < 5 else 9 + i - 5
        assert np.array_equal(made(listener), expected(pipeline, dict(prompt=PROMPTS[i % 5], seed=seed)))
    engines._loaded["unet"] = faulty.engine


def defaults():
    from accel.pipeline.pipeline import default_call

    return dict(default_call)


def test_an_order_that_nobody_wants_any_more_is_dropped(worker, ask):
    long = ask(worker, sampler="ddim", steps=150)
    while not long.order.done:
        time.sleep(0.005)
    long.order.cancel()
    assert isinstance(long.wait().error, Cancelled) and not long.images and long.order.done < 150
    assert made(ask(worker)).shape == (1, 64, 64, 3)


def test_previews_come_between_the_steps(worker, ask):
    listener = ask(worker, partial=2, sampler="ddim", steps=9)
    image = made(listener)[0].astype(float)
    assert len(listener.previews) == 2 and all(preview.size == (64, 64) for preview in listener.previews)
    likeness = np.corrcoef(np.asarray(listener.previews[-1], float).ravel(), image.ravel())[0, 1]
    assert likeness > 0.8


def test_a_full_queue_and_a_closing_server_say_so(ask, make_worker):
    worker = make_worker(limits=Limits(queue=3))
    first = ask(worker, sampler="ddim", steps=60, num_images_per_prompt=2)
    with pytest.raises(Busy, match="queue is full"):
        ask(worker, num_images_per_prompt=2)
    closing = threading.Thread(target=worker.close, args=(30,))
    closing.start()
    while not worker._closing:
        time.sleep(0.005)
    with pytest.raises(Busy, match="shutting down"):
        ask(worker)
    assert made(first).shape == (2, 64, 64, 3)  # what was begun is finished
    closing.join()
    assert worker.pipeline.closed


def test_what_is_left_at_the_end_of_the_time_is_told_so(worker, ask):
    long = ask(worker, sampler="ddim", steps=150, num_images_per_prompt=10)
    worker.close(0)
    assert isinstance(long.wait().error, Busy)


def test_one_at_a_time_makes_the_same_images(pipeline, ask, make_worker):
    worker = make_worker(share=False)
    try:
        listeners = [ask(worker, **call) for call in MIXED[:3]]
        for call, listener in zip(MIXED, listeners, strict=False):
            assert np.array_equal(made(listener), pixels(pipeline(**call).images))
    finally:
        worker.close(5)


def test_what_does_not_fit_is_refused_before_it_is_queued(worker, ask):
    for call, words in (
        (dict(width=63), "width 63"),
        (dict(steps=0), "number of steps: 0"),
        (dict(steps=151), "number of steps: 151"),
        (dict(num_images_per_prompt=11), "number of images: 11"),
        (dict(guidance_scale=float("nan")), "guidance_scale: nan"),
        (dict(loras=["x"]), "unknown lora 'x'"),
        (dict(image=np.zeros((64, 64, 3), np.uint8)), "vae_encoder|encoder"),
    ):
        listener = None
        with pytest.raises(UserError, match=words):
            listener = ask(worker, **call)
            raise listener.wait().error  # the last one is found when it is prepared
    assert not worker.orders
