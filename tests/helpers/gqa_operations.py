"""GQA's operations carried out on a scene graph: an answer found without the code that asked.

It reads nothing but the question's record and the scene graph, and knows the miniature's words by heart.

    answer = evaluate(record, graph)
"""

import re

VALUES = {
    "color": {"red", "green", "blue", "yellow", "purple", "white"},
    "shape": {"round", "square", "triangular"},
    "material": {"wood", "metal", "wool", "plastic"},
}
MEMBERS = {
    "animal": {"cat", "fish", "bird"},
    "vehicle": {"car", "boat"},
    "food": {"cake", "apple"},
    "furniture": {"lamp", "table", "clock"},
}


def evaluate(record: dict, graph: dict) -> str:
    """Carry out a record's operations, one after another, and put the last one's result into words."""
    results = []
    for step in record["semantic"]:
        given = [results[i] for i in step["dependencies"]]
        results.append(_carry_out(step["operation"], step["argument"].strip(), given, graph))
    return {True: "yes", False: "no"}.get(results[-1], results[-1])


def _carry_out(operation: str, argument: str, given: list, graph: dict):
    verb, _, kind = operation.partition(" ")
    match verb, kind:
        case "select", "":
            return _select(argument, graph)
        case "filter", _:
            return {i for i in given[0] if argument in _attributes(i, graph) & VALUES[kind]}
        case "relate", "":
            return _relate(argument, given[0], graph)
        case "query", "":
            return _query(argument, given[0], graph)
        case "choose" | "verify", "rel":
            name, relations, where = argument.split(",")
            (found,) = _select(f"{name} {where.removeprefix('s ')}", graph)
            (anchor,) = given[0]
            held = _relations(found, anchor, graph)
            if verb == "verify":
                return relations in held
            (true,) = held & set(relations.split("|"))
            return true.removeprefix("to the ").removesuffix(" of")
        case "choose", _:
            (true,) = {_query(kind, given[0], graph)} & set(argument.split("|"))
            return true
        case "verify", _:
            return _query(kind, given[0], graph) == argument
        case "exist", "":
            return bool(given[0])
        case "or", "":
            return given[0] or given[1]
        case "and", "":
            return given[0] and given[1]
        case "same", _:
            return _query(kind, given[0], graph) == _query(kind, given[1], graph)
        case "common", "":
            (common,) = [k for k in VALUES if _query(k, given[0], graph) == _query(k, given[1], graph)]
            return common
    raise ValueError(f"no such operation: {operation}")


def _select(argument: str, graph: dict) -> set[str]:
    """Find the objects of a name; the id beside it must be one of them, and "-" means that none is there."""
    if argument == "scene":
        return set()
    name, object_id = re.fullmatch(r"(\w+) \((\w+|-)\)", argument).groups()
    names = MEMBERS.get(name, {name})
    found = {i for i, thing in graph["objects"].items() if name == "thing" or thing["name"] in names}
    assert (object_id == "-") != bool(found) and (not found or object_id in found), argument
    return found


def _relate(argument: str, anchors: set[str], graph: dict) -> set[str]:
    _, relation, object_id = re.fullmatch(r"(_),(.+),s \((\w+)\)", argument).groups()
    (anchor,) = anchors
    found = {i for i in graph["objects"] if relation in _relations(i, anchor, graph)}
    assert object_id in found, argument
    return found


def _query(kind: str, found: set[str], graph: dict) -> str:
    if kind == "location":
        return graph["location"]
    (one,) = found  # what a question asks about must be the only one
    thing = graph["objects"][one]
    if kind == "name":
        return thing["name"]
    if kind == "hposition":
        return "left" if thing["x"] + thing["w"] / 2 < graph["width"] / 2 else "right"
    (value,) = VALUES[kind] & _attributes(one, graph)
    return value


def _attributes(object_id: str, graph: dict) -> set[str]:
    return set(graph["objects"][object_id]["attributes"])


def _relations(one: str, other: str, graph: dict) -> set[str]:
    return {r["name"] for r in graph["objects"][one]["relations"] if r["object"] == other}
