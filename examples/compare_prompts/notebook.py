"""Two prompts for one dataset, cell by cell: open it in an editor that knows ``# %%``, or run it as it is."""

# %% Ask both ways.
import promptmill

long = promptmill.run("comments.jsonl", model="demo", task="long.task.yaml", name="long")
short = promptmill.run("comments.jsonl", model="demo", task="short.task.yaml", name="short")

# %% What changed, and whether that is more than chance. Times of one run each are shown and not tested.
found = short.compare(long, force=True)
print(found.verdict)
for line in found.lines:
    print(line.name, line.before, line.after, line.change, line.ci, line.word or line.note)

# %% The rows behind it.
for flips in found.flips:
    print(f"{flips.name}: {flips.lost} lost {flips.lost_keys}, {flips.won} won {flips.won_keys}, p = {flips.p}")
