"""Configurations that cannot be read, or say what no run can do."""

from __future__ import annotations

from pathlib import Path

from rows import Row, Workspace


def value(name: str, *overrides: str, words: tuple[str, ...]) -> Row:
    """A run whose files are right, with overrides that no run can have."""
    return Row(name, "train", lambda w: w.train(*overrides), words)


def text(name: str, content: str | bytes, *words: str) -> Row:
    """A configuration file of this content."""
    return Row(name, "train", lambda w: ["--config", w.text("a.yaml", content)], ("a.yaml", *words))


def bank(w: Workspace, content: str) -> list[str | Path]:
    """Arguments of `medisee prepare ask` with a bank of this content."""
    return ["ask", "--records", w.folder / "data", "--bank", w.text("bank.yaml", content), "--out", w.out]


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
TOKEN = "square or angle brackets"

ROWS = [
    Row("missing", "train", lambda w: ["--config", w.folder / "none.yaml"], ("none.yaml", "cannot read")),
    Row("not YAML", "train", lambda w: ["--config", w.text("a.yaml", "train: [")], ("a.yaml", "YAML")),
    Row("a list", "train", lambda w: ["--config", w.text("a.yaml", "- train")], ("a.yaml", "mapping")),
    Row("circular base", "train", lambda w: ["--config", w.text("a.yaml", "base: a.yaml")], ("a.yaml", "circle")),
    Row("unknown key", "train", lambda w: w.train(train={"stepz": 3}), ("train.stepz", "'steps'")),
    Row("text for a number", "train", lambda w: w.train(train={"lr": "fast"}), ("train.lr", "'fast'")),
    Row("no steps", "train", lambda w: w.train("train.steps=0"), ("train.steps", "greater than or equal to 1")),
    Row("override without value", "train", lambda w: w.train("train.steps"), ("train.steps", "key=value")),
    Row("old key against compat", "train", lambda w: w.train("data.draws=unseeded"), ("data.draws", "compat: release")),
    Row("no training manifest", "train", lambda w: w.train(data={"train": []}), ("data.train", "manifest")),
    Row(
        "same token twice",
        "train",
        lambda w: w.train('model.candidate_tokens=["[SEG]", "[SEG]"]'),
        ("candidate_tokens", "different"),
    ),
    Row("nothing to resume", "train", lambda w: w.train("--resume"), ("nothing to resume", "--resume")),
    # Files.
    text("key twice", "train: {lr: 1}\nloss: {}\ntrain: {steps: 3}", "line 3", "'train'", "line 1"),
    text("inner key twice", "train:\n  lr: 1\n  lr: 2\n", "line 3", "'lr'"),
    text("quoted key twice", "train: {lr: 1, 'lr': 2}", "'lr'", "remove one"),
    text("nested flow", "train: " + "[" * 5000, "line 1", "50 levels"),
    text("nested blocks", "- " * 400 + "x", "50 levels"),
    text("nested mappings", "{a: " * 400, "50 levels"),
    text("aliases without end", BOMB, "line 5", "aliases"),
    text("alias of itself", "train: &a {x: *a}", "*a"),
    text("undefined alias", "train: *nothing", "'nothing'"),
    text("python tag", "train: !!python/object/apply:os.getcwd []", "tag"),
    text("set tag", "train: !!set {lr}", "!!set"),
    text("octal", "train: {seed: 010}", "010", "two ways"),
    text("base sixty", "train: {steps: 1:30}", "1:30", "two ways"),
    text("lone surrogate", 'train: {out: "\\udcff"}', "not a character"),
    text("not UTF-8", b"train: {out: \xff}", "utf-8"),
    text("UTF-16", "train: {}".encode("utf-16"), "utf-8"),
    text("NUL", b"train: {out: a\x00}", "special characters"),
    text("two documents", "train: {}\n---\nloss: {}\n", "line 2", "single document"),
    text("empty file", "", "mapping", "NoneType"),
    text("a text", "train.lr=1", "mapping", "str"),
    text("tab", "train:\n\tlr: 1\n", "line 2"),
    text("number as key", "3: {}", "3"),
    text("list as key", "[a]: {}", "unhashable"),
    text("a section is null", "train:\n", "train = None", "dictionary"),
    text("a section is a list", "loss: [bce]", "loss = ['bce']"),
    text("base is a list", "base: [a.yaml]", "base = ['a.yaml']", "path"),
    text("base is empty", "base: ''", "base = ''", "path"),
    text("base is absent", "base: none.yaml", "none.yaml", "correct `base`"),
    text("base with NUL", 'base: "a\\0b"', "base = 'a", "path"),
    Row(
        "key twice",
        "convert",
        lambda w: ["from-release", "--weights", w.folder, "--config", w.text("a.yaml", "a: 1\na: 2"), "--out", w.out],
        ("a.yaml", "line 2"),
    ),
    Row(
        "setting twice", "eval", lambda w: w.evaluate("--config", w.text("a.yaml", "a: 1\na: 2")), ("a.yaml", "line 2")
    ),
    Row("key twice", "ask", lambda w: ["--plan", "--config", w.text("a.yaml", "a: 1\na: 2")], ("a.yaml", "line 2")),
    Row("a folder", "train", lambda w: ["--config", w.folder], ("cannot read", "directory")),
    Row(
        "base with a key twice",
        "train",
        lambda w: ["--config", (w.text("b.yaml", "a: 1\na: 1"), w.text("a.yaml", "base: b.yaml"))[1]],
        ("b.yaml", "line 2"),
    ),
    Row(
        "bank with a key twice", "prepare", lambda w: bank(w, "structures: {}\nstructures: {}"), ("bank.yaml", "line 2")
    ),
    Row("nested bank", "prepare", lambda w: bank(w, "[" * 3000), ("bank.yaml", "50 levels")),
    Row("no bank", "prepare", lambda w: bank(w, "a: 1"), ("bank.yaml", "structures")),
    Row(
        "prices with a key twice",
        "data_gen",
        lambda w: ["plan", "--records", w.manifest, "--model", "m", "--prices", w.text("p.yaml", "m: {}\nm: {}")],
        ("p.yaml", "line 2"),
    ),
    Row(
        "names with a key twice",
        "data_gen",
        lambda w: ["plan", "--records", w.manifest, "--author", "offline", "--names", w.text("n.yaml", "a: {}\na: {}")],
        ("n.yaml", "line 2"),
    ),
    # Overrides.
    value("section and key", "train=3", "train.lr=1e-4", words=("'train=3'", "'train.lr=1e-4'", "contradict")),
    value("key and section", "train.lr=1e-4", "train={lr: 2e-4}", words=("contradict",)),
    value("override twice", "train.lr=1", "train.lr=2", words=("'train.lr=1'", "'train.lr=2'", "leave one out")),
    value("old and new name", "train.one_by_one=true", "train.unpadded=false", words=("contradict",)),
    value("override of bad YAML", "train.betas=[0.9", words=("train.betas=[0.9", "not valid YAML")),
    value("override with a key twice", "train={lr: 1, lr: 1}", words=("'lr'", "line 1")),
    value("nameless override", "=3", words=("'=3'", "key=value")),
    value("base as override", "base=other.yaml", words=("unknown key 'base'",)),
    # Numbers.
    value("negative seed", "train.seed=-1", words=("train.seed = -1", "greater than or equal to 0")),
    value("seed of 33 bits", "train.seed=4294967296", words=("train.seed", "less than 4294967296")),
    value("weight is NaN", "loss.text=.nan", words=("loss.text = nan", "finite")),
    value("negative weight", "loss.bce=-1", words=("loss.bce = -1", "0")),
    value("no weights", "loss={text: 0, bce: 0, dice: 0, box: 0}", words=("loss", "nothing would be learnt")),
    value("infinite rate", "train.lr=.inf", words=("train.lr = inf", "finite")),
    value("overflowing rate", "train.lr=1e999", words=("train.lr = inf", "finite")),
    value("rate of 1000", "train.lr=1000", words=("train.lr = 1000", "10")),
    value("decoder's rate of 0", "train.lr_mask_decoder=0", words=("train.lr_mask_decoder = 0",)),
    value("rate is no", "train.lr=no", words=("train.lr = False", "YAML reads yes, no")),
    value("steps are yes", "train.steps=yes", words=("train.steps = True", "YAML reads yes, no")),
    value("4000 digits", "train.steps=" + "9" * 4000, words=("train.steps", "1000000000")),
    value("beta of 1", "train.betas=[0.9, 1]", words=("train.betas.1 = 1", "less than 1")),
    value("negative decay", "train.weight_decay=-0.1", words=("train.weight_decay",)),
    value("no clip", "train.clip=0", words=("train.clip = 0",)),
    value("no images of val", "train.val_limit=0", words=("train.val_limit = 0",)),
    value("negative box step", "train.true_box_until=-1", words=("train.true_box_until",)),
    value("true box without end", "train.true_box=0.5", words=("true_box_until",)),
    value("recomputed layers", "train.recompute_layers=-1", words=("train.recompute_layers = -1",)),
    value("NaN for DeepSpeed", "train.deepspeed={a: .nan}", words=("deepspeed", "not finite")),
    value("a million workers", "data.workers=1000000", words=("data.workers", "1024")),
    value("huge share", "data.train=[{records: a, weight: 1000000000}]", words=("data.train.0.weight",)),
    value("all words dropped", "data.word_dropout=1", words=("data.word_dropout",)),
    value("no resamples", "eval.resamples=0", words=("eval.resamples = 0",)),
    value("no new tokens", "eval.max_new_tokens=0", words=("eval.max_new_tokens = 0",)),
    # Sizes.
    value("heads that do not divide", "model.mllm.size.heads=3", words=("hidden 32", "heads 3")),
    value("kv heads that do not divide", "model.mllm.size.kv_heads=3", words=("heads 2", "kv_heads 3")),
    value("no heads", "model.mllm.size.heads=0", words=("model.mllm.size.heads = 0",)),
    value("100,000 layers", "model.mllm.size.layers=100000", words=("model.mllm.size.layers", "1000")),
    value("no router", "model.router_hidden=0", words=("model.router_hidden = 0",)),
    value("no box decoder", "model.box_hidden=0", words=("model.box_hidden = 0",)),
    value("dropout of 1", "model.mllm.size.dropout=1", words=("model.mllm.size.dropout", "less than 1")),
    value("LoRA without scale", "model.mllm.lora.alpha=0", words=("model.mllm.lora.alpha = 0",)),
    value("odd frame", "model.seg_head.size=72", words=("size 72", "multiple of 16")),
    value("grid that does not divide", "model.mllm.image_grid=3", words=("image_grid 3", "grid of 4")),
    value("block outside", "model.seg_head.sizes={global_attention: [12]}", words=("block 12 of 12",)),
    value("channels", "model.seg_head.sizes={channels: 100}", words=("channels 100", "multiple of 8")),
    value("patch above size", "model.mllm={image_tokens: vision_tower, vision_size: 8}", words=("vision_size 8",)),
    value("vision heads", "model.mllm={image_tokens: vision_tower, vision_heads: 3}", words=("vision_heads (3)",)),
    value(
        "coarse masks",
        "train.coarse_masks_until=1",
        "model.seg_head.size=48",
        "model.mllm.image_grid=3",
        words=("odd (3)",),
    ),
    # Texts.
    value("empty token", "model.candidate_tokens=['']", words=("candidate_tokens.0 = ''", TOKEN)),
    value("ordinary word", "model.candidate_tokens=[the]", words=("candidate_tokens.0 = 'the'", TOKEN)),
    value("token with a space", "model.candidate_tokens=['[SEG A]']", words=("[SEG A]", TOKEN)),
    value("token within another", "model.candidate_tokens=['[SEG]', '[[SEG]]']", words=("[[SEG]]", TOKEN)),
    value("end token", "model.candidate_tokens=['</s>']", words=("</s>", "reserved")),
    value("image token", "model.candidate_tokens=['<image>']", words=("<image>", "reserved")),
    value("prompt's token", "model.candidate_tokens=['[INST]']", words=("[INST]", "reserved")),
    value("byte token", "model.candidate_tokens=['<0x0A>']", words=("<0x0A>", "reserved")),
    value("unquoted token", "model.candidate_tokens=[[SEG]]", words=("candidate_tokens.0 = ['SEG']", "string")),
    value("empty path", "train.out=''", words=("train.out = ''", "empty")),
    value("path of spaces", "data.val='  '", words=("data.val", "empty")),
    value("path of two lines", 'train.out="a\\nb"', words=("train.out", "line break")),
    value("path with NUL", 'data.cache="a\\0"', words=("data.cache", "control character")),
    value("path is no", "train.out=no", words=("train.out = False", "quotes")),
    value("path is a number", "train.out=3", words=("train.out = 3", "quotes")),
    value("answer without tokens", "eval.forced_answer='It is.'", words=("eval.forced_answer", "{candidates}")),
    value("answer with braces", "eval.forced_answer='{candidates} {x}'", words=("no other braces",)),
    value("cut answer", "eval.forced_answer='{candidates:.3}'", words=("no other braces",)),
    value("broken answer", "eval.forced_answer='{candidates'", words=("no other braces",)),
]
