import pytest
import torch
from small_selectors import SMALL, make_batch, make_selector
from torch.nn import functional as F
from transformers import AutoModel

from lever_grpo import PointerSelector, PointerSelectorConfig


PRIORS = ("prior", "v1-prior", "v3-prior-sets")


def cosine(x: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(x.unsqueeze(1), pool, dim=-1)  # (B, K)


def baseline(batch: dict) -> torch.Tensor:
    """What the prior of `conftest` starts at: 3 · (cos of the questions + 0.5 · cos of the images)."""
    question, image = batch["query_embeds"].split([4, 3], dim=-1)
    of_question, of_image, _ = batch["candidate_embeds"].split([4, 3, 4], dim=-1)
    return 3.0 * (cosine(question, of_question) + 0.5 * cosine(image, of_image))


@pytest.mark.parametrize("reloaded", [False, True])
@pytest.mark.parametrize("kind", PRIORS)
def test_an_untrained_selector_is_the_similarity_baseline(kind, reloaded, tmp_path):
    selector, batch = make_selector(kind, trained=False), make_batch(queries=4)
    if reloaded:
        selector.save_pretrained(tmp_path)
        selector = AutoModel.from_pretrained(tmp_path)
    logits = baseline(batch)
    steps = selector(**batch, return_step_log_probs=True).step_log_probs
    torch.testing.assert_close(steps[:, 0, 0], logits.log_softmax(-1))
    # later steps: the same logits without what was picked
    for step in (1, 2):
        picked = torch.zeros(4, 3, 5, dtype=torch.bool).scatter(-1, batch["sequences"][..., :step], True)
        expected = logits.unsqueeze(1).masked_fill(picked, -torch.inf).log_softmax(-1)
        torch.testing.assert_close(steps[:, :, step], expected)
    greedy = selector.select(batch["query_embeds"], batch["candidate_embeds"], num_shots=3).sequences[:, 0]
    assert torch.equal(greedy, logits.topk(3).indices)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_logits_are_exactly_scale_times_cosine(rank):
    config = PointerSelectorConfig(embed_dim=6, hidden_dim=8, similarity_prior=True, prior_rank=rank)
    selector = PointerSelector(config).eval()
    query, pool = torch.randn(3, 6), torch.randn(3, 5, 6)
    encoding = selector.encode(query, pool)
    torch.testing.assert_close(
        selector.prior(encoding.prior, torch.zeros(3, 1, 0, dtype=torch.long)).squeeze(1), 20.0 * cosine(query, pool)
    )
    assert (selector.pointer(encoding.state, encoding.candidates) == 0).all()


def test_the_baseline_holds_in_training_mode_too():
    # dropout inside the change of the metric must not stir the start
    selector, batch = make_selector("v3-prior-sets", trained=False).train(), make_batch()
    steps = selector(**batch, return_step_log_probs=True).step_log_probs
    torch.testing.assert_close(steps[:, 0, 0], baseline(batch).log_softmax(-1))


def test_without_a_prior_an_untrained_selector_is_no_baseline():
    steps = make_selector(trained=False)(**make_batch(), return_step_log_probs=True).step_log_probs
    assert not torch.allclose(steps[:, 0, 0], baseline(make_batch()).log_softmax(-1), atol=0.1)


def test_a_pair_that_starts_at_zero_can_be_taken_in():
    selector, batch = make_selector("v1-prior", trained=False), make_batch()
    selector(**batch).log_probs.sum().backward()
    assert (selector.prior.mix.grad.abs() > 1e-6).all()
    assert (selector.prior.redundancy.grad.abs() > 1e-6).all()
    assert (selector.prior.agreement.grad.abs() > 1e-6).all()


def test_agreement_lets_the_near_candidates_vote():
    selector = make_selector("prior", trained=False)
    batch = make_batch(queries=1, pool=4, group=1, shots=1)
    answers = batch["candidate_embeds"][0, :, -4:]
    answers[:] = torch.eye(4, dtype=torch.float64)
    answers[2] = answers[1]  # 1 and 2 have one answer, the others their own
    before = selector(**batch, return_step_log_probs=True).step_log_probs[0, 0, 0]
    with torch.no_grad():
        selector.prior.agreement[list(selector.prior.candidate_metric).index("answer")] = 0.1
    after = selector(**batch, return_step_log_probs=True).step_log_probs[0, 0, 0]
    votes = before.exp()  # η is 1 at the start
    votes = torch.stack([votes[0], votes[1] + votes[2], votes[1] + votes[2], votes[3]])
    torch.testing.assert_close(after, (before + 3.0 * 16 * 0.1 * votes).log_softmax(-1))


def test_pair_logits_are_the_logits_of_any_pool_without_its_votes():
    selector, batch = make_selector("prior"), make_batch()
    with torch.no_grad():
        selector.prior.agreement.zero_()
    every = selector.prior.pair_logits(batch["query_embeds"], batch["candidate_embeds"].flatten(0, 1))
    assert every.shape == (2, 2, 10)
    for query in range(2):
        encoding = selector.encode(batch["query_embeds"], batch["candidate_embeds"]).prior
        own = every[:, query, 5 * query : 5 * query + 5]
        torch.testing.assert_close(own, torch.stack([encoding.first[query], encoding.later[query]]))


def test_a_negative_redundancy_repels_what_is_like_the_picks():
    selector = make_selector("v1-prior", trained=False)
    batch = make_batch(queries=1, pool=4)
    batch["candidate_embeds"][0, 1] = batch["candidate_embeds"][0, 0]  # 1 is 0 again
    batch["sequences"] = torch.tensor([[[0, 1], [0, 2]]])
    before = selector(**batch, return_step_log_probs=True)
    with torch.no_grad():
        selector.prior.redundancy.fill_(-2.0)
    after = selector(**batch, return_step_log_probs=True)
    torch.testing.assert_close(after.step_log_probs[:, :, 0], before.step_log_probs[:, :, 0])  # no pick, no effect
    assert after.log_probs[0, 0, 1] < before.log_probs[0, 0, 1] - 1


def test_the_scale_of_the_embeddings_does_not_matter_to_the_prior():
    selector, batch = make_selector("v1-prior", trained=False), make_batch()
    longer = {**batch, "query_embeds": 7 * batch["query_embeds"], "candidate_embeds": 0.1 * batch["candidate_embeds"]}
    torch.testing.assert_close(selector(**longer).log_probs, selector(**batch).log_probs)


def test_half_precision_does_not_tie_the_baseline():
    # 8 bits cannot tell cosines of 0.9 and 0.9005; the prior is computed in full precision
    config = PointerSelectorConfig(
        **{
            **SMALL,
            "embed_dim": 64,
            "query_features": None,
            "candidate_features": None,
            "prior_pairs": None,
            "similarity_prior": True,
        }
    )
    selector = PointerSelector(config).eval()
    torch.manual_seed(0)
    query = torch.randn(1, 64)
    pool = query.unsqueeze(1) + 0.4 * torch.randn(1, 50, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        picks = selector.select(query, pool, num_shots=20).sequences[0, 0]
    assert torch.equal(picks, cosine(query, pool)[0].topk(20).indices)
