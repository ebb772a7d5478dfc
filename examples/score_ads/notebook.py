"""The first score, cell by cell: open it in an editor that knows ``# %%``, or run it as it is."""

# %% Ask the model about each comment. The task file says what is asked, expected and scored.
import promptmill

job = promptmill.run("comments.jsonl", model="demo", task="ads.task.yaml")
print(job.state, job.report()["success_rate"])

# %% What it came to. The interval says how far eight comments can be believed.
score = job.scores()["is_ad"]
low, high = score.ci95
print(f"accuracy {score.value:.0%}, 95 % CI [{low:.0%}, {high:.0%}], {score.correct} of {score.n} right")
for name, value in score.figures.values.items():
    print(name, value, score.figures.intervals.get(name) or score.figures.reasons.get(name))

# %% The rows themselves, as a table of any library.
table = job.to_arrow(prompts=True)
print(table.num_rows, table.column_names[:6])

# %% Score the same answers by another task file: no engine runs. Here the same one, by the length of the comment.
run = job.score("ads.task.yaml", by="input.comment")
print(f"score run @s{run.number}", len(run.groups), "groups")
