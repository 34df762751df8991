#!/usr/bin/env python3
"""Turns an example into one that lists its volume file by file: reads objects as JSON (`kubectl create --dry-run=client -o json`,
one after the other), gives each pod's container the command, and prints a List.

Usage: kubectl create --dry-run=client -o json -f EXAMPLE | listing.py SCRIPT
"""
import json
import sys

decoder, text, objects = json.JSONDecoder(), sys.stdin.read().strip(), []
while text:
    found, end = decoder.raw_decode(text)
    objects += found["items"] if found["kind"] == "List" else [found]
    text = text[end:].lstrip()
for o in objects:
    spec = o.get("spec", {})
    spec = spec.get("template", {}).get("spec", spec)
    for container in spec.get("containers", []):
        container["command"] = ["sh", "-c", sys.argv[1], "/image"]
json.dump({"apiVersion": "v1", "kind": "List", "items": objects}, sys.stdout)
