"""A chat layout: `mmv train sft --set data.layout=alpaca` trains with the prompts of Stanford Alpaca.

The layout's name is saved with the weights, so `mmv eval` and `mmv chat` use it without being asked.
"""

from minimind_v.core.data.layouts import CHAT_LAYOUTS, ChatLayout, Piece

HEADERS = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}


class Alpaca(ChatLayout):
    """Headers of plain text; an answer ends with `<|im_end|>`, as in every layout that does not say otherwise."""

    system_prompt = "Below is an instruction that describes a task. Write a response that completes the request."

    def message(self, role: str, content: str) -> list[Piece]:
        header = HEADERS[role]
        if role == "assistant":  # what stands behind the header is supervised, and so is the end
            return [Piece(header + content, supervised_from=len(header)), *self.answer_end()]
        return [Piece(f"{header}{content}\n\n")]

    def answer_start(self) -> list[Piece]:
        return [Piece(HEADERS["assistant"])]


CHAT_LAYOUTS["alpaca"] = Alpaca()
