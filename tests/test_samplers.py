import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, SCMScheduler
from worlds import SD_SCHEDULER, VP

from stepdistill.families.base import read_kind, read_schedule
from stepdistill.samplers import LISTS, TOLERANCE, Sampler, deviation, find_sampler
from stepdistill.sampling import Hop, Inference, trailing
from stepdistill.schedules import RectifiedFlow

TEACHERS = {
    "eps": DDIMScheduler(**SD_SCHEDULER, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "v": DDIMScheduler(**SD_SCHEDULER, prediction_type="v_prediction"),
    "flow": FlowMatchEulerDiscreteScheduler(),
    "shift3": FlowMatchEulerDiscreteScheduler(shift=3.0),
}
GRIDS = {  # the timesteps that a trailing grid of the table of 1000 visits
    1: [999],
    2: [999, 499],
    4: [999, 749, 499, 249],
    8: [999, 874, 749, 624, 499, 374, 249, 124],
}
SIGMAS = {
    "flow": {1: [1], 2: [1, 0.5], 4: [1, 0.75, 0.5, 0.25], 8: [k / 8 for k in range(8, 0, -1)]},
    "shift3": {1: [1], 2: [1, 0.75], 4: [1, 0.9, 0.75, 0.5], 8: [3 * k / (8 + 2 * k) for k in range(8, 0, -1)]},
}


def find(teacher, n, renoise=True, **how):
    scheduler = TEACHERS[teacher] if isinstance(teacher, str) else teacher
    schedule = read_schedule(scheduler)
    hops = how.pop("hops", None) or trailing(schedule.grid(n))
    return find_sampler(schedule, read_kind(scheduler), scheduler.config, Inference(hops, renoise, **how))


@pytest.mark.parametrize("n", GRIDS)
@pytest.mark.parametrize("teacher", ["eps", "v"])
@pytest.mark.parametrize(("renoise", "kind"), [(True, "LCMScheduler"), (False, "DDIMScheduler")])
def test_table_grids_need_no_arguments(teacher, renoise, kind, n):
    sampler = find(teacher, n, renoise)
    scheduler = sampler.build()
    scheduler.set_timesteps(n)
    assert (sampler.scheduler, sampler.call) == (kind, {"num_inference_steps": n})
    assert scheduler.timesteps.tolist() == GRIDS[n]
    assert not scheduler.config.clip_sample


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("teacher", ["flow", "shift3"])
@pytest.mark.parametrize("renoise", [True, False])
def test_flow_grids_need_no_arguments(teacher, renoise, n):
    sampler = find(teacher, n, renoise)
    scheduler = sampler.build()
    scheduler.set_timesteps(n)
    assert sampler.scheduler == ("FlowMatchLCMScheduler" if renoise else "FlowMatchEulerDiscreteScheduler")
    assert sampler.call == {"num_inference_steps": n}
    assert scheduler.sigmas.tolist() == pytest.approx([*SIGMAS[teacher][n], 0], abs=1e-6)
    assert scheduler.timesteps.tolist() == pytest.approx([1000 * s for s in SIGMAS[teacher][n]], abs=1e-3)


@pytest.mark.parametrize("n", [1, 2, 4, 8])
@pytest.mark.parametrize("renoise", [True, False])
def test_a_pipeline_that_passes_sigmas_needs_only_the_shift(renoise, n):
    schedule = read_schedule(TEACHERS["shift3"])
    how = Inference(trailing(schedule.grid(n)), renoise)
    sampler = find_sampler(schedule, "flow", TEACHERS["shift3"].config, how, passes_sigmas=True)
    scheduler = sampler.build()
    scheduler.set_timesteps(sigmas=[1 - k / n for k in range(n)])  # as FluxPipeline does
    assert sampler.call == {"num_inference_steps": n}
    assert scheduler.sigmas.tolist() == pytest.approx([*SIGMAS["shift3"][n], 0], abs=1e-6)


@pytest.mark.parametrize("times", [(1.0, 0.5, 0.45), (1.0, 0.8, 0.3), (1.0, 0.5), (1.0,)])
@pytest.mark.parametrize("passes_sigmas", [True, False])
def test_up_to_three_steps_need_no_list_of_times_if_they_begin_at_noise_and_fall_ever_slower_or_evenly(times, passes_sigmas):
    how = Inference(tuple(map(Hop, times)), renoise=False)
    found = find_sampler(read_schedule(TEACHERS["shift3"]), "flow", TEACHERS["shift3"].config, how, passes_sigmas, takes=())
    assert found.call == {"num_inference_steps": len(times)}  # it has been tried on numbers


@pytest.mark.parametrize("times", [(0.98, 0.5), (1.0, 0.934, 0.853, 0.609)])
def test_times_that_only_a_list_can_give_are_refused_where_the_pipeline_takes_none(times):
    how = Inference(tuple(map(Hop, times)), renoise=False)
    with pytest.raises(ValueError, match="the pipeline takes no sigmas"):
        find_sampler(RectifiedFlow(3.0), "flow", {}, how, takes={"timesteps"})
    assert find_sampler(RectifiedFlow(3.0), "flow", {}, how, takes={"sigmas"}).call["sigmas"] == list(times)
    with pytest.raises(ValueError, match="the pipeline takes no timesteps"):
        find_sampler(VP, "eps", SD_SCHEDULER, Inference((Hop(399 / 999),)), takes=())


def test_the_plain_flow_config_is_the_documented_one():
    assert {key: find("flow", 4, False).config[key] for key in ("shift", "shift_terminal")} == {
        "shift": 1.0,
        "shift_terminal": 0.25,
    }
    assert find("flow", 1, False).config["shift_terminal"] is None  # a stretch to 1 divides by zero


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("renoise", [True, False])
def test_every_number_of_steps_is_served(teacher, renoise):
    for n in (3, 5, 6, 7, 16, 50):
        assert find(teacher, n, renoise).call["num_inference_steps"] == n  # what is found has been tried on numbers


@pytest.mark.parametrize("n", GRIDS)
@pytest.mark.parametrize("teacher", ["eps", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_eta_is_an_argument_of_tcd_scheduler(teacher, n, eta):
    sampler = find(teacher, n, eta=eta)
    scheduler = sampler.build()
    scheduler.set_timesteps(n)
    assert (sampler.scheduler, sampler.call) == ("TCDScheduler", {"num_inference_steps": n, "eta": eta})
    assert scheduler.timesteps.tolist() == GRIDS[n] and sampler.comfyui is None and sampler.a1111 is None


def test_eta_on_other_grids_and_on_flow():
    assert find("eps", 3, eta=0.3).call == {"num_inference_steps": 3, "timesteps": [999, 666, 332], "eta": 0.3}
    assert find("eps", 2, eta=0.5, hops=(Hop(800 / 999), Hop(500 / 999))).call["timesteps"] == [800, 500]
    for n in (1, 2, 4):
        for eta, renoise in ((0.0, False), (1.0, True)):
            assert find("shift3", n, eta=eta) == find("shift3", n, renoise)
    with pytest.raises(ValueError, match=r"eta 0.3 is TCD's.*set it to 0 or 1"):
        find("flow", 2, eta=0.3)


def test_times_of_ones_own():
    assert find("eps", 1, hops=(Hop(399 / 999),)).call["timesteps"] == [399]  # DMD2's one step of SDXL
    assert find("eps", 3).call["timesteps"] == [999, 666, 332]
    flow = find("flow", 2, hops=(Hop(0.9338), Hop(0.6)), renoise=True)
    assert flow.call["sigmas"] == [0.9338, 0.6] and flow.config["shift"] == 1
    assert find("eps", 2, False, hops=(Hop(1.0), Hop(500 / 999))).scheduler == "DPMSolverMultistepScheduler"


def test_the_table_is_the_teachers():
    teacher = EulerDiscreteScheduler(beta_start=0.001, beta_end=0.01, beta_schedule="linear")
    table = find(teacher, 4).build().alphas_cumprod
    assert torch.equal(table, teacher.alphas_cumprod)
    assert not torch.allclose(table, find("eps", 4).build().alphas_cumprod)


LCM, DDIM, EULER, FLOW = "LCMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("teacher", "n", "renoise", "scheduler", "config", "call"),
    [
        pytest.param("eps", 8, True, LCM, {"original_inference_steps": 100}, {}, id="visits 879, not 874"),
        pytest.param("eps", 4, True, LCM, {}, {}, id="visits 759, not 749"),
        pytest.param("eps", 6, False, DDIM, {"timestep_spacing": "trailing"}, {}, id="steps down by T // N"),
        pytest.param("eps", 4, False, DDIM, {"timestep_spacing": "leading"}, {}, id="starts at 751"),
        pytest.param("eps", 4, False, EULER, {"timestep_spacing": "trailing"}, {}, id="wants noise of another size"),
        pytest.param("v", 4, True, LCM, {"original_inference_steps": 4}, {}, id="reads v as eps"),
        pytest.param("flow", 4, False, FLOW, {}, {}, id="ends at 0.001"),
        pytest.param("flow", 4, False, FLOW, {"shift": 3.0}, {"sigmas": SIGMAS["flow"][4]}, id="shifts again"),
        pytest.param("flow", 4, False, "FlowMatchLCMScheduler", {"shift_terminal": 0.25}, {}, id="draws noise"),
    ],
)
def test_a_wrong_scheduler_is_found_out(teacher, n, renoise, scheduler, config, call):
    schedule, kind = read_schedule(TEACHERS[teacher]), read_kind(TEACHERS[teacher])
    table = {} if kind == "flow" else SD_SCHEDULER
    sampler = Sampler(scheduler, table | config, {"num_inference_steps": n} | call)
    assert deviation(sampler, schedule, kind, Inference(trailing(schedule.grid(n)), renoise)) > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("scheduler", "config", "call"),
    [
        pytest.param("TCDScheduler", {"original_inference_steps": 1000}, {"eta": 0.4}, id="more noise"),
        pytest.param("TCDScheduler", {"original_inference_steps": 1000}, {}, id="its own eta"),
        pytest.param("TCDScheduler", {}, {"eta": 0.5}, id="visits 759, not 749"),
        pytest.param(DDIM, {"timestep_spacing": "trailing"}, {"eta": 0.5}, id="DDIM's eta is another"),
    ],
)
def test_a_wrong_eta_is_found_out(scheduler, config, call):
    sampler = Sampler(scheduler, SD_SCHEDULER | config, {"num_inference_steps": 4} | call)
    assert deviation(sampler, VP, "eps", Inference(trailing(VP.grid(4)), eta=0.5)) > 10 * TOLERANCE


def test_clipping_is_found_out():
    schedule, how = read_schedule(TEACHERS["eps"]), Inference(trailing(read_schedule(TEACHERS["eps"]).grid(4)), False)
    for clip, off in ((True, True), (False, False)):
        config = {**SD_SCHEDULER, "timestep_spacing": "trailing", "clip_sample": clip}
        sampler = Sampler("DDIMScheduler", config, {"num_inference_steps": 4})
        assert (deviation(sampler, schedule, "eps", how) > TOLERANCE) == off


def test_students_that_take_turns():
    """The scheduler walks on as for one; ComfyUI is told which steps belong to whom, and A1111 cannot do it."""
    last = len(VP.theta) - 1
    hops = tuple(Hop(k / last, f"student_{1 + (k < 500)}") for k in (999, 749, 499, 249))
    found = find_sampler(VP, "eps", SD_SCHEDULER, Inference(hops, renoise=False))
    assert found.students == ("student_1", "student_1", "student_2", "student_2") and found.a1111 is None
    assert found.comfyui["student_1"] == "steps 0 to 2" and found.comfyui["student_2"] == "steps 2 to 4"
    alone = find_sampler(VP, "eps", SD_SCHEDULER, Inference(tuple(map(Hop, [hop.time for hop in hops])), renoise=False))
    assert alone.students == ("student",) and alone.config == found.config and alone.call == found.call


@pytest.mark.parametrize("teacher", TEACHERS)
def test_a_network_that_hears_another_time_leaves_the_scheduler_alone(teacher):
    """Other programs tell a network its sampler's own time, so no words of theirs are known."""
    plain, told = find(teacher, 1), find(teacher, 1, told=0.0)
    assert (told.scheduler, told.config, told.call) == (plain.scheduler, plain.config, plain.call)
    assert told.comfyui is None and told.a1111 is None and told.told is None


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"hops": (Hop(1.0), Hop(0.75))}, "time 0.75 is timestep 749.25.*write 0.74975, which is 749"),
        ({"hops": (Hop(1.0, "teacher"), Hop(0.5, "student"))}, "asks teacher"),
        ({"hops": (Hop(1.0, scale=3.0),)}, "guides"),
        ({"hops": (Hop(1.0, "student_1"), Hop(499 / 999, "student_2")), "told": 0.5}, "hears time 0.5 at every step"),
    ],
)
def test_what_no_stock_pipeline_can_do_is_refused(how, told):
    with pytest.raises(ValueError, match=told):
        find("eps", 2, **how)


def test_words_of_other_programs_are_told_only_where_they_are_exact():
    comfy = {"sampler": "lcm", "scheduler": "simple", "cfg": 1.0}
    assert find("eps", 4).comfyui == comfy and find("eps", 4).a1111 is None  # A1111 visits 999, 759, 499, 259
    assert find("eps", 2).a1111 == {"sampler": "LCM", "schedule type": "Simple", "cfg scale": 1.0}
    assert find("eps", 3).comfyui is None  # `simple` visits 333, not 332
    assert find("eps", 4, False).comfyui == comfy | {"sampler": "euler"}
    assert find("v", 4).comfyui is None
    assert find("shift3", 4, False).comfyui == comfy | {"sampler": "euler", "ModelSamplingSD3 shift": 3.0}
    assert find("flow", 2, hops=(Hop(0.9), Hop(0.6))).comfyui is None
    schedule = RectifiedFlow(math.exp(1.15))  # FLUX.1's at 1024 x 1024
    flux = schedule, "flow", TEACHERS["flow"].config, Inference(trailing(schedule.grid(4)), True), True, LISTS
    both = {"ModelSamplingFlux max_shift": 1.15, "ModelSamplingFlux base_shift": 1.15}
    assert find_sampler(*flux, "ModelSamplingFlux").comfyui == comfy | both
    assert find_sampler(*flux, None).comfyui is None


@pytest.mark.parametrize("times", [(1.0,), (1.0, 0.4)])
def test_angles_of_pipelines_that_speak_of_trigflow(times):
    """Sana-Sprint's scheduler walks any one or two times of rectified flow, and renoises between them."""
    sampler = find(SCMScheduler(), len(times), hops=tuple(Hop(time) for time in times))
    assert sampler.scheduler == "SCMScheduler" and sampler.call["num_inference_steps"] == len(times)
    assert sampler.call["intermediate_timesteps"] == (pytest.approx(math.atan2(0.4, 0.6)) if len(times) > 1 else None)


@pytest.mark.parametrize(
    ("times", "renoise", "told"),
    [((1.0, 0.5), False, "set renoise to true"), ((1.0, 0.75, 0.5, 0.25), True, "no stock scheduler visits the times")],
)
def test_angles_that_no_trigflow_pipeline_visits(times, renoise, told):
    with pytest.raises(ValueError, match=told):
        find(SCMScheduler(), len(times), renoise, hops=tuple(Hop(time) for time in times))
