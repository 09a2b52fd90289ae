"""The release's numbers, out of our model: inputs, states, boxes, masks, losses and gradients of given golden values.

MEDISEE_GOLDEN names the folder (default: tests/golden); golden_release.py says what is in it and reads it. `pytest -s`
prints the largest relative error of each group.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_release import TOLERANCE, Case, Pass, load_case, run
from torch import Tensor

from medisee.evaluation.metrics import score, summarise
from medisee.models import losses
from medisee.models.geometry import cxcywh_to_xyxy, logits_to_original
from medisee.models.losses import Terms, end_to_end_loss
from medisee.weights.medisee_release import our_name, our_values

GOLDEN = Path(os.environ.get("MEDISEE_GOLDEN", Path(__file__).parents[1] / "golden"))
RELEASES = sorted(GOLDEN.glob("release_*.json"))
EPS = torch.finfo(torch.float32).eps
MASKS = ("gt_mask", "pred_mask")


@pytest.fixture(scope="module", params=RELEASES, ids=[path.stem for path in RELEASES])
def case(request: pytest.FixtureRequest) -> Iterator[Case]:
    loaded = load_case(request.param)
    yield loaded
    print(f"\n{request.param.stem}: largest relative error")
    for group, error in loaded.errors.groups.items():
        print(f"  {error:8.1e}  {group}")


def training_pass(case: Case, *, packed: bool) -> Pass:
    case.model.train()
    return run(case, list(range(len(case.examples))), case.arrays["input_ids"], packed=packed)


def loss_of(case: Case, done: Pass) -> Terms:
    return end_to_end_loss(done.output, done.batch, case.config.loss, release=case.config.release)


def full_masks(done: Pass) -> list[Tensor]:
    assert done.output.masks_Jhh is not None
    frames = [done.batch.frames[index] for index in done.batch.image_of_target_I.tolist()]
    return [logits_to_original(mask, frame) for mask, frame in zip(done.output.masks_Jhh, frames, strict=True)]


def check_heads(case: Case, done: Pass, prefix: str) -> None:
    """Compares what is one row a conversation, from the routers to the low-resolution masks."""
    errors, arrays, seen, order = case.errors, case.arrays, done.seen, case.order
    for router, module in (("router_seg", case.model.seg_router), ("router_box", case.model.box_router)):
        theirs = arrays[f"{prefix}{router}_weights"][:, order]
        errors.check(f"{router} weights", module.weights(seen["states"]), theirs)
        errors.check(f"{router} fused", seen[f"{router}_fused"], arrays[f"{prefix}{router}_fused"])
    errors.check("text projection", seen["text_fc"], arrays[f"{prefix}text_fc"])
    errors.check("boxes", seen["pred_bboxes_cxcywh"], arrays[f"{prefix}pred_bboxes_cxcywh"])
    errors.check("sparse prompts", seen["sparse_prompt"], arrays[f"{prefix}sparse_prompt"])
    assert done.output.masks_Jhh is not None
    errors.check("low-resolution masks", done.output.masks_Jhh[:, None], arrays[f"{prefix}low_res_masks"])


def test_there_are_golden_files() -> None:
    assert RELEASES


def test_preprocessing(case: Case) -> None:
    """From raw images and masks to both encoders' inputs, and to the boxes that are learnt."""
    processor, arrays, errors = case.model.processor, case.arrays, case.errors
    for index, example in enumerate(case.examples):
        image, frame = arrays[f"raw_image_{index}"], processor.frame(example.height, example.width)
        assert (frame.resized_height, frame.resized_width) == tuple(arrays["resize_list"][index])
        assert (frame.height, frame.width) == tuple(arrays["original_sizes"][index])
        errors.check("seg head's input", processor.seg_pixels(image), arrays["images"][index])
        errors.check("vision tower's input", processor.vision_pixels(image), arrays["images_clip"][index])
        truth = processor([example], release=case.config.release).boxes_I4
        assert truth is not None
        errors.check("true boxes", truth, arrays[f"gt_bboxes_{index}"])


@pytest.mark.parametrize("packed", [False, True])
def test_forward(case: Case, packed: bool) -> None:
    """Every state from the encoders to the masks, with one conversation a sequence and with one image a sequence."""
    arrays, errors, model = case.arrays, case.errors, case.model
    with torch.no_grad():
        done = training_pass(case, packed=packed)
        errors.check("seg head's embedding", model.embed_images(done.batch), arrays["train_sam_image_embeddings"])
        logits = model.text_logits(done.hidden_SLD)
    images = case.image_of_conversation
    features, projected = (done.seen[name].reshape(len(case.examples), -1, width) for name, width in widths(case))
    errors.check("vision tower's features", features[images], arrays["train_clip_features"])
    errors.check("projector", projected[images], arrays["train_mm_projector"])
    for conversation, row in enumerate(done.rows):
        for group, name, states in (
            ("first layer's states", "train_layer0_hidden", done.seen["layer0_hidden"]),
            ("last states", "train_last_hidden", done.hidden_SLD),
            ("text logits", "train_logits", logits[..., : case.facts["final_vocab"]]),
        ):
            errors.check(group, row.states(states), arrays[name][conversation, : len(row.ids)])
    for index, name in enumerate(model.config.candidate_tokens):
        theirs = arrays[{"[SEG]": "train_emb_seg", "[BBOX]": "train_emb_bbox"}[name]]
        errors.check("candidate states", done.seen["states"][:, index], theirs)
    for router in ("router_seg", "router_box"):
        errors.check(f"{router} logits", done.seen[f"{router}_logits"], arrays[f"train_{router}_logits"][:, case.order])
    check_heads(case, done, "train_")
    quality = model.seg_head.mask_decoder.iou_prediction_head(done.seen["quality_states"])[:, :1]
    errors.check("mask quality (not used)", quality, arrays["train_iou_pred"])
    masks = full_masks(done)
    for image in range(len(case.examples)):
        own = torch.stack([masks[conversation] for conversation in case.conversations(image)])
        errors.check("full masks", own, arrays[f"train_pred_masks_{image}"])


def widths(case: Case) -> list[tuple[str, int]]:
    sizes = case.facts["config"]
    return [("clip_features", sizes["clip"]["hidden"]), ("mm_projector", sizes["llm"]["hidden_size"])]


@pytest.mark.parametrize("packed", [False, True])
def test_losses(case: Case, packed: bool) -> None:
    """Every term with and without its weight, the total, and each image's own means."""
    with torch.no_grad():
        done = training_pass(case, packed=packed)
        terms = loss_of(case, done)
    weights, arrays, check = case.config.loss, case.arrays, case.errors.check
    check("loss terms", terms.text * weights.text, arrays["loss_ce_loss"])
    check("loss terms", terms.bce, arrays["loss_bce_unweighted"])
    check("loss terms", terms.dice, arrays["loss_dice_unweighted"])
    check("loss terms", terms.l1, arrays["loss_bbox_l1_unweighted"])
    check("loss terms", terms.giou, arrays["loss_bbox_giou_unweighted"])
    check("loss terms", weights.bce * terms.bce, arrays["loss_mask_bce_loss"])
    check("loss terms", weights.dice * terms.dice, arrays["loss_mask_dice_loss"])
    check("loss terms", weights.bce * terms.bce + weights.dice * terms.dice, arrays["loss_mask_loss"])
    check("loss terms", weights.box * (weights.l1 * terms.l1 + weights.giou * terms.giou), arrays["loss_bbox_loss"])
    check("total loss", terms.total, arrays["loss_loss"])
    masks, truth = full_masks(done), done.batch
    assert truth.boxes_I4 is not None
    boxes, images = done.output.boxes_I4, truth.image_of_target_I
    of_each = {
        "l1": losses.l1_loss(boxes, truth.boxes_I4),
        "giou": losses.giou_loss_of_release(boxes, truth.boxes_I4, images),
        "bce": torch.cat([losses.bce_loss(a[None], b[None]) for a, b in zip(masks, truth.masks, strict=True)]),
        "dice": torch.cat([losses.dice_loss(a[None], b[None]) for a, b in zip(masks, truth.masks, strict=True)]),
    }
    for name, theirs in case.facts["losses"]["per_image"].items():
        ours = torch.stack([of_each[name][images == image].mean() for image in range(len(case.examples))])
        check("loss terms of each image", ours, torch.tensor(theirs))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients(case: Case, packed: bool) -> None:
    """The same tensors learn, the given gradients are equal, and so is the norm of every other one."""
    model = case.model
    model.zero_grad()
    loss_of(case, training_pass(case, packed=packed)).total.backward()
    parameters = dict(model.named_parameters())
    ours = {key: our_name(key, lora=True) for key in case.facts["trainable"]}
    assert set(ours.values()) == {name for name, parameter in parameters.items() if parameter.requires_grad}
    for key in (name for name in case.arrays if name.startswith("grad::")):
        name = our_name(key.removeprefix("grad::"), lora=True)
        assert name is not None
        theirs = our_values(name, torch.from_numpy(case.arrays[key]), model.config.candidate_tokens)
        gradient = parameters[name].grad
        assert gradient is not None
        case.errors.check("gradients", gradient, theirs)
    norms, groups = case.facts["grad_norms"], case.errors.groups
    assert set(norms) <= set(ours)
    for key, name in ours.items():
        gradient, theirs = parameters[str(name)].grad, norms.get(key, 0.0)
        norm = 0.0 if gradient is None else float(gradient.double().norm())
        # Gradients that cancel out (softmax does not see a bias of the keys) are rounding noise of their layer.
        noise = EPS * parameters[str(name)].numel() ** 0.5 * norms.get(f"{key.removesuffix('.bias')}.weight", 0.0)
        error = max(0.0, abs(norm - theirs) - noise) / max(theirs, 1e-30)
        groups["gradient norms"] = max(error, groups.get("gradient norms", 0.0))
        assert error <= TOLERANCE, f"{key}: {norm}, expected {theirs}"


def test_evaluation(case: Case) -> None:
    """Each image alone, in evaluation mode; then with the box prompt rounded to bfloat16."""
    arrays, model = case.arrays, case.model.eval()
    for image in range(len(case.examples)):
        ids = arrays[f"eval{image}_input_ids"]
        with torch.no_grad():
            done = run(case, [image], ids, packed=True)
        check_heads(case, done, f"eval{image}_")
        for conversation, row in enumerate(done.rows):
            theirs = arrays[f"eval{image}_last_hidden"][conversation, : len(row.ids)]
            case.errors.check("last states", row.states(done.hidden_SLD), theirs)
        case.errors.check("full masks", torch.stack(full_masks(done)), arrays[f"eval{image}_pred_masks"])
        model.config = model.config.model_copy(update={"box_dtype": "bfloat16"})
        with torch.no_grad():
            rounded = run(case, [image], ids, packed=True)
        model.config = case.config.model
        theirs = arrays[f"eval{image}_pred_masks_bf16box"]
        case.errors.check("full masks, box in bfloat16", torch.stack(full_masks(rounded)), theirs)


def test_metrics() -> None:
    """The five figures. The release adds epsilons to counts and unions and is undefined for boxes without area."""
    golden = json.loads((GOLDEN / "metrics.json").read_text())
    scores = []
    for item in golden["items"]:
        true, predicted = (np.array([[pixel == "1" for pixel in row] for row in item[name]]) for name in MASKS)
        x0, y0, x1, y1 = cxcywh_to_xyxy(torch.tensor([item["pred_box"]]))[0].tolist()
        scores.append(score(predicted, true, (x0, y0, x1, y1), tuple(item["gt_box"])))
    ours = summarise(scores, resamples=1).to_json()
    theirs = golden["one_mask_per_image"]
    slack = 1e-5 / len(scores) + 1e-5 / min(each.union for each in scores if each.union) + 1e-6
    for name, key in (("Dice", "Dice"), ("gIoU", "gIoU"), ("cIoU", "cIoU"), ("IoU", "boxIoU"), ("Acc", "Acc@0.5")):
        if math.isfinite(theirs[key]):
            assert ours[name] == pytest.approx(theirs[key], rel=slack, abs=1e-6), name
