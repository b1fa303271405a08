"""Replayed steps are the steps of decoding, and divergences are divergences."""

from __future__ import annotations

import pytest
import torch

from expertshare.decoding import BlockDecoder, DecodingOptions
from expertshare.decoding.row import Window
from expertshare.evaluation.runner import Setup
from expertshare.models import LoadedModel, Runtime
from expertshare.routing import Layerwise, make_policy, parse_policy
from expertshare.tuning.replay import Replay, coarse_divergence
from expertshare.tuning.trajectories import pack, record_trajectories, thin_out

OPTIONS = DecodingOptions(gen_length=24, threshold=0.5, stop_at_eos=False)
PROMPTS = [list(range(5, 24)), [30, 31, 32], list(range(40, 51))]
VANILLA = make_policy("vanilla")
RUNTIME = Runtime(policy=VANILLA)


def test_every_step_is_recorded(any_model: LoadedModel) -> None:
    found = record_trajectories(any_model, PROMPTS, OPTIONS, setup=Setup(backend="torch", batch_size=2))
    decoder = BlockDecoder(any_model.model, Runtime(policy=VANILLA), OPTIONS)
    for prompt, trajectory in zip(PROMPTS, found, strict=True):
        stream = decoder.blocks([prompt])
        answer = [token for block in stream for token in block.token_ids]
        assert len(trajectory.snapshots) == stream.generation().cost.forwards["denoise"]
        start = trajectory.geometry.answer_start
        assert trajectory.final_C[start : start + len(answer)].tolist() == answer
        written = sum(int(snapshot.written_L.sum()) for snapshot in trajectory.snapshots)
        assert written == trajectory.geometry.canvas_length - start


@pytest.mark.parametrize("text", ["vanilla", "des-vote", "des-vote:voters=masked"])
def test_replayed_hidden_states_are_those_of_decoding(any_model: LoadedModel, text: str) -> None:
    """Under vanilla on its own trajectory every step must come out as it did; under another policy the step is run as
    decoding would run it, from vanilla's tokens: checked by decoding with the tokens forced."""
    policy = parse_policy(text).bind(any_model.config.router)
    prompt = PROMPTS[0]
    (trajectory,) = record_trajectories(any_model, [prompt], OPTIONS, setup=Setup(backend="torch", batch_size=1))
    expected = _forced(any_model, prompt, trajectory, policy)
    replayed = []
    for item in pack([trajectory], any_model.config):
        output = any_model.model(item.inputs, Runtime(policy=policy))
        replayed.append(output.hidden_BSD[item.scored_BS])
    torch.testing.assert_close(torch.cat(replayed), torch.cat(expected), rtol=1e-4, atol=1e-4)


def _forced(model: LoadedModel, prompt: list[int], trajectory, policy) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """Hidden states of the written positions, from the decoder's own forwards with vanilla's tokens put in by hand."""
    stream = BlockDecoder(model.model, Runtime(policy=policy), OPTIONS).blocks([prompt])
    row = stream.rows[0]
    found: list[torch.Tensor] = []
    with torch.no_grad():
        stream.forwards.prefill([row])
        for snapshot in trajectory.snapshots:
            if snapshot.block != row.block:
                row.tokens_C[row.start : row.end] = trajectory.final_C[row.start : row.end]
                row.masked_C[row.start : row.end] = False
                stream.forwards.commit([row])
                row.enter_next_block()
            row.tokens_C[row.start : row.end] = snapshot.tokens_L
            row.masked_C[row.start : row.end] = snapshot.masked_L
            found.append(stream.forwards.denoise([row], Window.of([row]))[0][snapshot.written_L])
    return found


def test_vanilla_does_not_diverge_from_itself(any_model: LoadedModel) -> None:
    trajectories = record_trajectories(any_model, PROMPTS, OPTIONS, setup=Setup(backend="torch", batch_size=3))
    replay = Replay.of(any_model, trajectories, runtime=RUNTIME)
    vanilla = replay.measure(VANILLA)
    assert (vanilla.divergence, vanilla.flips) == (0.0, 0.0)
    narrow = replay.measure(Layerwise(layers=(VANILLA, make_policy("des-vote", {"budget": 6}))))
    assert narrow.divergence > 0
    assert narrow.by_layer[1] <= 6 < narrow.by_layer[0] == pytest.approx(vanilla.by_layer[0])


def test_thinning_keeps_the_first_and_the_last_step(any_model: LoadedModel) -> None:
    (trajectory,) = record_trajectories(any_model, PROMPTS[:1], OPTIONS, setup=Setup(backend="torch", batch_size=1))
    thin = thin_out(trajectory, 3)
    assert [thin.snapshots[0], thin.snapshots[-1]] == [trajectory.snapshots[0], trajectory.snapshots[-1]]
    assert len(thin.snapshots) == 3


def test_divergence_is_kullback_leiblers_on_the_tokens_and_the_rest() -> None:
    p, q = torch.tensor([0.5, 0.3, 0.1, 0.1]), torch.tensor([0.25, 0.25, 0.25, 0.25])
    full = float((p * (p / q).log()).sum())
    whole = coarse_divergence(p.log()[None], q.log()[None])
    coarse = coarse_divergence(p.log()[None, :2], q.log()[None, :2])
    by_hand = float((p[:2] * (p[:2] / q[:2]).log()).sum() + 0.2 * torch.tensor(0.2 / 0.5).log())
    assert float(whole) == pytest.approx(full, abs=1e-5)
    assert float(coarse) == pytest.approx(by_hand, abs=1e-5)
    assert float(coarse) <= full + 1e-6
