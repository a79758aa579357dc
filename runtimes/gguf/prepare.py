"""From a request to a job that the engine can run: template, tokens, sampler, grammar, text. Runs beside the engine's loop.

A resumed request's state is rebuilt by feeding it the delivered tokens; the text that they made was sent by the Island before.
"""

from __future__ import annotations

from protocol import limits
from protocol.errors import Code, Refused
from protocol.generation import FinishReason, GenerationRequest, unpack_tokens
from runtimes.gguf.detokenize import TextStream
from runtimes.gguf.engine import Job, reason_to_end
from runtimes.gguf.grammar import TokenGrammar
from runtimes.gguf.llama import Model
from runtimes.gguf.messages import Ended
from runtimes.gguf.sampler import Sampler
from runtimes.gguf.template import ChatTemplate
from runtimes.gguf.tool_parser import CallParser
from runtimes.gguf.tool_syntax import MARKS, ToolSyntax, must_call

_ECHO_BYTES_MAX = limits.JOB_CHUNK_TEXT_BYTES_MAX - 4096  # it travels in one chunk with the first token's text


class Preparer:
    """Makes jobs for one model. One thread calls it."""

    def __init__(self, model: Model, template: ChatTemplate | None, context_tokens: int) -> None:
        self._model, self._template, self._context_tokens = model, template, context_tokens
        # a control token has no piece, but text in the prompt: template texts are full of them
        texts = (model.piece(token) or model.special_text(token).encode() for token in range(model.n_vocab))
        self._piece_bytes_max = max(map(len, texts), default=0) or 1
        self._end_tokens = model.end_tokens()
        self.tools = template.tools if template is not None else ToolSyntax.NONE
        self._marks = self._silent_marks()

    def job(self, number: int, request: GenerationRequest, salt: bytes, gbnf: str) -> Job:
        """Raises Refused(bad_input, context_length_exceeded)."""
        if request.echo and len(request.prompt.encode()) > _ECHO_BYTES_MAX:
            raise Refused(Code.BAD_INPUT, f"a prompt of over {_ECHO_BYTES_MAX} bytes cannot be echoed; ask without echo")
        prompt = self._prompt(request)
        self._check_length(len(prompt), request.max_tokens)
        resume = unpack_tokens(request.resume)
        if any(not 0 <= token < self._model.n_vocab for token in resume):
            raise Refused(Code.BAD_INPUT, "the answer to go on with holds tokens that this model does not have")
        grammar = TokenGrammar(self._model, gbnf, self._end_tokens) if gbnf else None
        calls = None
        if request.tools:
            names = [tool.name for tool in request.tools]
            calls = CallParser(self.tools, names, request.parallel_calls, begun=must_call(request))
        job = Job(
            number=number,
            request=request,
            salt=salt,
            prompt_tokens=len(prompt),
            tokens=prompt + resume,
            sampler=Sampler(request.sampling, prompt, grammar),
            grammar=grammar,
            text=TextStream(request.stop),
            echo=request.prompt if request.echo and not resume else "",
            calls=calls,
            marks=self._marks if calls is not None else {},
        )
        self._resume(job, resume)
        return job

    def finished(self, job: Job) -> Ended | None:
        """The end of a job whose delivered tokens are the whole answer."""
        reason = reason_to_end(job) if job.resumed else None
        if reason is None and job.resumed and job.tokens[-1] in self._end_tokens:
            reason = FinishReason.STOP
        if reason is None:
            return None
        return Ended(job.number, reason, job.prompt_tokens, job.made, 0, job.rest(), 0.0, 0.0)

    def _silent_marks(self) -> dict[int, bytes]:
        """Control tokens that begin and end calls: they have no text in answers otherwise."""
        marks = MARKS.get(self.tools)
        found = {}
        for mark in (marks.begin, marks.end, marks.optional) if marks is not None else ():
            tokens = self._model.tokenize(mark, add_special=False, parse_special=True) if mark else []
            if len(tokens) == 1 and not self._model.piece(tokens[0]):
                found[tokens[0]] = mark.encode()
        return found

    def _prompt(self, request: GenerationRequest) -> list[int]:
        if not request.messages:
            self._check_size(request.prompt, request.max_tokens)
            tokens = self._model.tokenize(request.prompt, add_special=True, parse_special=True)
            return tokens or self._beginning()
        if self._template is None:
            raise Refused(Code.BAD_INPUT, "this model has no chat template; ask it through /v1/completions")
        text = self._template.render(request.messages, request.tools)
        if must_call(request):
            text += MARKS[self.tools].lead
        self._check_size(text, request.max_tokens)
        tokens = self._model.tokenize(text, add_special=True, parse_special=True)
        bos = self._model.bos()
        if tokens[:2] == [bos, bos] and self._model.adds_bos():  # the template and the tokenizer both put one
            del tokens[0]
        return tokens or self._beginning()

    def _beginning(self) -> list[int]:
        """An empty prompt still needs one token to give logits."""
        bos = self._model.bos()
        if bos < 0:
            raise Refused(Code.BAD_INPUT, "the prompt is empty and this model has no token to begin with")
        return [bos]

    def _check_size(self, text: str, max_tokens: int) -> None:
        """Refuses before tokenizing what is certainly too long: a token has at most so many bytes."""
        least = len(text.encode("utf-8", "replace")) // self._piece_bytes_max
        if least > self._context_tokens:
            raise self._too_long(f"at least {least}", max_tokens)

    def _check_length(self, prompt_tokens: int, max_tokens: int) -> None:
        if prompt_tokens + max_tokens > self._context_tokens:
            raise self._too_long(str(prompt_tokens), max_tokens)

    def _too_long(self, prompt_tokens: str, max_tokens: int) -> Refused:
        return Refused(
            Code.CONTEXT_LENGTH,
            f"this model's maximum context length is {self._context_tokens} tokens; the request has {prompt_tokens} in its "
            f"messages and asks for {max_tokens} of completion. Shorten the messages or lower max_tokens.",
        )

    def _resume(self, job: Job, resume: list[int]) -> None:
        for token in resume:
            if job.grammar is not None and not job.grammar.allows(token):
                raise Refused(Code.BAD_INPUT, "the answer to go on with does not fit the JSON schema")
            job.sampler.accept(token)
            job.said(token, self._model.piece(token))
        job.made = job.resumed = len(resume)
