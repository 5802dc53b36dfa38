"""A server in a real Ray cluster: a replica is killed, and the bundle replaced, under load; nothing is lost."""

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
from collections import Counter

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

PROMPTS = [f"a handwritten {word}" for word in ("zero", "one", "two", "three")]
OLD, NEW, ABREAST = "digits/4step-int8", "digits/4step", 12


@pytest.fixture
def cluster():
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    yield made
    made.shutdown()


def serve(cluster, model, port, *args):
    """The command, which ends when the replicas are there: what it prints."""
    command = [sys.executable, "-m", "accel", "serve", f"drawing={model}", "--ray", "--ray-address", cluster.address]
    command += ["--engine", "onnxruntime", "--port", str(port), "--json", *args]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["url"]


def replicas():
    return [p for p in psutil.process_iter() if "ServeReplica:accel:drawing" in " ".join(p.cmdline() or [p.name()])]


def body(number):
    """The request of a number: one image or two, few steps or more, with a stream now and then."""
    found = {"prompt": PROMPTS[number % 4], "seed": number % 3, "n": 1 + (number % 7 == 0)}
    if number % 3 == 1:
        found |= {"num_inference_steps": 8, "sampler": "ddim"}
    if number % 5 == 2:
        found |= {"stream": True, "partial_images": 1}
    return found


def pixels(text):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).astype(int)


async def ask(client, number):
    """Images of a request by their seeds."""
    answer = await client.post("/v1/images/generations", json=body(number), timeout=120)
    assert answer.status_code == 200, (number, answer.status_code, answer.text[:300])
    if not body(number).get("stream"):
        return {one["seed"]: pixels(one["b64_json"]) for one in answer.json()["data"]}
    messages = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
    kinds = Counter(message["type"].rpartition(".")[2] for message in messages)
    assert kinds == {"partial_image": body(number)["n"], "completed": body(number)["n"]}, (number, kinds)
    return {one["seed"]: pixels(one["b64_json"]) for one in messages if one["type"].endswith("completed")}


def references(model):
    """Images by prompt, seed and steps, made by twos: int8 has the same bits in every call of more than one row."""
    import accel

    found = {}
    with accel.load(model, "onnxruntime", threads=1) as pipe:
        for prompt in PROMPTS:
            for seed in range(4):
                for steps in (None, 8):
                    how = {} if steps is None else {"steps": steps, "sampler": "ddim"}
                    image = pipe(prompt, seed=seed, num_images_per_prompt=2, **how).images[0]
                    found[prompt, seed, steps] = np.asarray(image).astype(int)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_replica_is_killed_and_the_bundle_replaced_under_load(cluster, unused_tcp_port=8765):
    url = serve(cluster, OLD, unused_tcp_port, "--replicas", "2", "--cpus-per-replica", "1")
    health = httpx.get(f"{url}/health").json()
    assert health == {"status": "ok", "models": ["drawing"], "replicas": {"drawing": {"RUNNING": 2}}}
    assert len(replicas()) == 2
    old, new = references(OLD), references(NEW)
    drawn, events, versions = [], {}, Counter()

    async def client_of(client):
        while "over" not in events:
            number = len(drawn)
            drawn.append(number)
            images = await ask(client, number)
            assert len(images) == body(number)["n"]
            for seed, image in images.items():
                key = body(number)["prompt"], seed, body(number).get("num_inference_steps")
                far = {"old": abs(old[key] - image).max(), "new": abs(new[key] - image).max()}
                assert min(far.values()) <= 1, (number, far)
                versions[min(far, key=far.get)] += 1

    async def story():
        await asyncio.sleep(3)
        events["killed"] = len(drawn)
        replicas()[0].kill()
        await asyncio.sleep(12)
        events["updated"] = len(drawn)
        await asyncio.to_thread(serve, cluster, NEW, unused_tcp_port, "--replicas", "2", "--cpus-per-replica", "1")
        before = dict(versions)
        await asyncio.sleep(3)
        events["over"] = len(drawn)
        events["after"] = {name: versions[name] - before.get(name, 0) for name in versions}

    async def everything():
        async with httpx.AsyncClient(base_url=url) as client:
            await asyncio.gather(story(), *(client_of(client) for _ in range(ABREAST)))

    asyncio.run(everything())
    print(events, versions)
    assert events["killed"] < events["updated"] < events["over"] and versions["old"] > 20 and versions["new"] > 10
    assert events["after"]["new"] > 0 and events["after"].get("old", 0) == 0
    assert httpx.get(f"{url}/health").json()["replicas"] == {"drawing": {"RUNNING": 2}}
    numbers = httpx.get(f"{url}/metrics").text
    assert numbers.count("# TYPE accel_images_total counter") == 1 and 'accel_images_total{model="drawing"' in numbers


def test_what_a_replica_says_is_the_error_and_its_fix():
    from types import SimpleNamespace as Of

    from accel.serving.cluster.deploy import why

    message = "The deployment failed:\nTraceback ...\naccel.errors.UserError: invalid batch: 64 rows\n  fix: --batch 32"
    deployment = Of(message=message, status="DEPLOY_FAILED")
    status = Of(applications={"accel": Of(deployments={"x": deployment, "front": Of(message="", status="HEALTHY")})})
    assert why(status, "failed") == ("invalid batch: 64 rows", "--batch 32")
    assert why(Of(applications={}), "no controller") == ("no controller", "`ray logs` has all of it")


def test_an_address_where_no_cluster_is_is_refused_at_once(refused):
    pytest.importorskip("ray")
    assert "there is no Ray cluster at 127.0.0.1:1" in refused("serve", OLD, "--ray", "--ray-address", "127.0.0.1:1")


@pytest.mark.slow
def test_what_the_cluster_has_no_room_for_is_said_before_it_is_started(refused):
    pytest.importorskip("ray")
    words = refused("serve", OLD, "--ray", "--ray-address", "local", "--replicas", "2", "--cpus-per-replica", "1000")
    assert "do not fit: there is room for 0" in words
