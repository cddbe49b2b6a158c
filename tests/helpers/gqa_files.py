"""Questions and scene graphs in GQA's true layout, and a row of the authors' CSV files."""


def step(operation, argument, *dependencies):
    return {"operation": operation, "dependencies": list(dependencies), "argument": argument}


def entry(question, answer, types, semantic, annotations, **more):
    structural, kind, detailed = types.split()
    return {
        "semantic": semantic,
        "entailed": [],
        "equivalent": [],
        "question": question,
        "imageId": "23",
        "isBalanced": True,
        "groups": {"global": None, "local": "x"},
        "answer": answer,
        "semanticStr": "->".join(f"{s['operation']}: {s['argument']}" for s in semantic),
        "annotations": {"answer": {}, "question": annotations, "fullAnswer": {}},
        "types": {"structural": structural, "semantic": kind, "detailed": detailed},
        "fullAnswer": f"It is {answer}.",
    } | more


QUESTIONS = {
    "01": entry(
        "Is the jar full or empty?",
        "empty",
        "choose attr chooseAttr",
        [step("select", "jar (11)"), step("choose", "empty|full", 0)],
        {"2": "11"},
    ),
    "02": entry(
        "Is the man to the left or to the right of the man that holds a jar?",
        "right",
        "choose rel relChooser",
        [
            step("select", "jar (11)"),
            step("relate", "man,holding,s (12)", 0),
            step("choose rel", "man,to the right of|to the left of,s (13)", 1),
        ],
        {"2": "13", "11:12": "12", "15": "11"},
    ),
    "03": entry(
        "Are there any jars or mud that are not brown?",
        "No",
        "logical obj existThatOr",
        [step("select", "jar (11)"), step("exist", "?", 0), step("select", "mud (-) "), step("or", "", 0, 1)],
        {"3": "11"},
    ),
    "04": entry(
        "What is on the white table?",
        "jar",
        "query rel relS",
        [step("select", "table (14)"), step("relate", "_,on,s (11)", 0), step("query", "name", 1)],
        {"4:6": "14"},
    ),
    "05": entry(
        "Is it indoors or outdoors?",
        "indoors",
        "choose global locationChoose",
        [step("select", "scene"), step("choose location", "indoors|outdoors", 0)],
        {},
    ),
}
GRAPHS = {
    "23": {
        "width": 500,
        "height": 375,
        "objects": {
            "11": {"name": "jar", "x": 253, "y": 291, "w": 60, "h": 105, "attributes": [], "relations": []},
            "12": {"name": "man", "x": -5, "y": 10, "w": 50, "h": 60, "attributes": [], "relations": []},
            "13": {"name": "man", "x": 499, "y": 374, "w": 500, "h": 500, "attributes": [], "relations": []},
            "14": {"name": "table", "x": 0, "y": 0, "w": 0, "h": 50, "attributes": [], "relations": []},
        },
    }
}
ROW = {
    "question_id": "1",
    "img_id": "23",
    "question": "Is the jar full or empty?",
    "answer": "empty",
    "true option": "empty",
    "false option": "full",
    "central object name": "jar",
    "central object id": "11",
    "type_detailed": "chooseAttr",
    "type_semantic": "attr",
    "type_structural": "choose",
    "captions": "a jar.",
    "image_w": "500",
    "image_h": "375",
    "central object w": "60",
    "central object h": "105",
    "central object x": "253",
    "central object y": "291",
}
