"""Options that make a benchmark a matter of seconds."""

SMALL = ["model.width=4", "train.epochs=1", "finetune.epochs=1", "data.train_size=96", "prune.recalibrate=64"]
SET = [part for override in SMALL for part in ("--set", override)]
NARROW = ["--levels", "0.7,0.5", "--scopes", "local", "--seeds", "0"]
