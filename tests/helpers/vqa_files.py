"""OKVQA's two files and A-OKVQA's, in their true layouts."""

PONY = ["pony tail", "pony tail", "pony tail", "pony tail", "pony tail"] + ["braid"] * 3 + ["ponytail", "Tail"]
HEAD = {
    "info": {"description": "This is v1.0 of the dataset."},
    "license": {"url": "http://creativecommons.org/licenses/by/4.0/", "name": "CC BY 4.0"},
    "data_subtype": "val2014",
    "data_type": "mscoco",
    "task_type": "Open-Ended",
}


def question(question_id, image_id, text="What is the hairstyle called?"):
    return {"image_id": image_id, "question": text, "question_id": question_id}


def annotation(question_id, image_id, answers=PONY):
    said = [
        {"answer_id": k, "raw_answer": f"{a}s", "answer_confidence": "yes", "answer": a}
        for k, a in enumerate(answers, start=1)
    ]
    ids = {"image_id": image_id, "question_id": question_id}
    return ids | {"answer_type": "other", "question_type": "four", "answers": said}


QUESTIONS = HEAD | {"questions": [question(425, 42), question(427, 42, "Who is it?"), question(85, 8)]}
ANNOTATIONS = HEAD | {
    "question_types": {"four": "Sports and Recreation", "other": "Other"},
    "annotations": [annotation(85, 8), annotation(427, 42, ["a girl"] * 10), annotation(425, 42)],
}
AOKVQA = [
    {
        "split": "val",
        "image_id": 42,
        "question_id": "22MexNkBPpdZGX6sxbxVBH",
        "question": "What is the man by the bags awaiting?",
        "choices": ["skateboarder", "train", "delivery", "cab"],
        "correct_choice_idx": 3,
        "direct_answers": ["ride", "ride", "bus", "taxi", "travel", "traffic", "taxi", "cab", "cab", "Taxi"],
        "difficult_direct_answer": False,
        "rationales": ["A train would not be on the street.", "He has bags.", "He looks about."],
    },
    {
        "split": "val",
        "image_id": 43,
        "question_id": "2aaaaaaaaaaaaaaaaaaaaa",
        "question": "How many?",
        "choices": ["two", "three", "four", "five"],
        "correct_choice_idx": 0,
        "direct_answers": ["two"] * 10,
        "difficult_direct_answer": True,
        "rationales": ["One.", "Two.", "Three."],
    },
]
