"""Write easy-VQA as rows that mmv reads: `python easy_vqa.py FOLDER`, where FOLDER is `easy_vqa/data` of the package.

Each split gets a `metadata.jsonl` beside its images. In training up to three questions about an image are one
conversation, in an order drawn by a fixed seed: the image's tokens are then read once for all three. In the test split
each question stands alone. Prints what two guessers reach that never get an image: one gives the most frequent answer,
the other the most frequent answer to each question.
"""

import json
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

TURNS = 3  # of a conversation; an answer can give away later ones, so more of them teach less about the image
KINDS = {"yes or no": ("yes", "no"), "shape": ("circle", "rectangle", "triangle")}  # all other answers are colours

folder = Path(sys.argv[1])
train, test = (json.loads((folder / split / "questions.json").read_text()) for split in ("train", "test"))


def write(split: str, rows: list[dict[str, object]]) -> None:
    (folder / split / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{split}: {len(rows)} rows")


by_image = defaultdict(list)
for question, answer, image in train:
    by_image[image].append((question, answer))
rows = []
for image, pairs in by_image.items():
    random.Random(image).shuffle(pairs)
    for start in range(0, len(pairs), TURNS):
        messages = []
        for question, answer in pairs[start : start + TURNS]:
            mark = "" if messages else "<image>\n"
            messages += [{"role": "user", "content": mark + question}, {"role": "assistant", "content": answer}]
        rows.append({"file_name": f"images/{image}.png", "conversations": messages})
write("train", rows)

rows = []
for question, answer, image in test:
    kind = next((kind for kind, answers in KINDS.items() if answer in answers), "colour")
    rows.append({"file_name": f"images/{image}.png", "question": question, "answer": answer, "kind": kind})
write("test", rows)

answers, by_question = Counter(), defaultdict(Counter)
for question, answer, _ in train:
    answers[answer] += 1
    by_question[question][answer] += 1
always = answers.most_common(1)[0][0]
guesses = {question: counts.most_common(1)[0][0] for question, counts in by_question.items()}
print(f"always {always!r}: {sum(answer == always for _, answer, _ in test) / len(test):.1%} of the test answers")
right = sum(guesses.get(question, always) == answer for question, answer, _ in test)
print(f"the most frequent answer to each question: {right / len(test):.1%}")
