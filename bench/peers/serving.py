"""A contender's side of the conversation: standard library only, so that it runs in every environment."""

import json
import os
import sys
import traceback


def serve(**calls):
    """Answer one JSON object a line with the named function's result, until the input ends.

    What the script prints must not get between the answers: standard output is turned into standard error.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        try:
            answer = {"result": calls[asked.pop("call")](**asked)}
        except Exception as error:  # noqa: BLE001 - told to the one who asked
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
