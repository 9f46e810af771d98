"""The retraining loop under whatever happens: hypothesis makes up histories, and some things must hold in all of them.

Reconciler, promoter, ledger, launcher, pointer and the commands that move it are the real ones; the services are in memory.
Every call of a service is a place where an invocation may be left waiting while others go on, may die, or lose the answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, NamedTuple
from unittest.mock import ANY

import msgspec
import pytest
from botocore.exceptions import ReadTimeoutError
from greenlet import getcurrent, greenlet
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from cli import takeover
from cli.deployment import Deployment
from labelloop import artifacts, launcher, promotion, retrain, shadow, snapshot_index
from labelloop.artifacts import Champions
from labelloop.errors import LabelloopError, LabelStudioError, RegistryError, ServiceError, StorageError
from labelloop.launcher import Launcher, job_name, training_request
from labelloop.ledger import Ledger
from labelloop.model_config import ModelConfig, Retrain
from labelloop.policy import decide
from labelloop.promotion import Promoter, judge, judge_live
from labelloop.records import Champion, Evaluation, GateRules, Head, Job, Promotion, Region, ShadowPair, Training, Verdict, now
from labelloop.retrain import ASKED, Reconciler
from labelloop.settings import Settings
from tests import examples
from tests.fake_aws import FakeBucket, FakeDynamoDB, FakeRegistry, FakeSageMaker, Wired
from tests.fake_label_studio import FakeLabelStudio

MODEL = "digits"
CONFIG = msgspec.structs.replace(
    examples.DIGITS, retrain=Retrain(at=[2, 4], factor=1.5, cooldown_minutes=5, failure_backoff_minutes=10)
)
CONFIGS: Any = {MODEL: SimpleNamespace(config=CONFIG, label_config=examples.LABELS)}
SETTINGS = Settings(
    {
        "LABELLOOP_STAGE": "local",
        "LABELLOOP_IMAGES_BUCKET": "images",
        "LABELLOOP_ARTIFACTS_BUCKET": "artifacts",
        "LABELLOOP_MLFLOW_TRACKING_URI": "http://127.0.0.1:9",
        "LABELLOOP_TRAINING_ROLE": "arn:aws:iam::000000000000:role/labelloop-training",
        "LABELLOOP_TRAINING_IMAGE": "763104351884.dkr.ecr.us-east-1.amazonaws.com/pytorch-training:2.14-cu133",
        "LABELLOOP_TRAINING_CODE": "s3://artifacts/code/abc.zip",
        "AWS_REGION": "us-east-1",
    }
)
MANY = 20  # annotations, enough for six trainings
LONG = timedelta(hours=25)  # longer than any waiting time of the policy
TIMED_OUT = ReadTimeoutError(endpoint_url="https://aws")

Archive = Literal["sound", "damaged", "another model file", "another job's", "missing"]
FaultKind = Literal["dies before", "dies after", "fails before", "fails after"]


class Violation(AssertionError):
    """Something that must hold in every history does not."""


def demand(holds: bool, what: str) -> None:
    if not holds:
        raise Violation(what)


class Crash(BaseException):
    """The end of a function's process, which nothing in it can catch."""


class Clock(datetime):
    """The time of the test, which passes by a millisecond a call and when a rule says so."""

    moment: ClassVar[datetime]

    @classmethod
    def now(cls, tz: Any = None) -> Any:  # noqa: ARG003
        return cls.moment


class Fault(NamedTuple):
    """What befalls an invocation at a call, `before` or `after` that takes effect: the process dies, or the call fails."""

    call: int
    kind: FaultKind


class Invocation(greenlet):  # type: ignore[misc]  # it has no types
    """One run of a function or a command, which stops at each of its calls until it is told to go on."""

    def __init__(self, work: Callable[[], object], fault: Fault | None, ended: Callable[[bool], None]) -> None:
        super().__init__()
        self._work, self._fault, self._ended, self._calls = work, fault, ended, count()
        self.failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._work()
        except (LabelloopError, Crash) as error:
            self.failure = error
        self._ended(self.failure is None)

    def go_on(self, calls: int) -> None:
        """Do so many calls, or fewer when it ends."""
        for _ in range(calls + 1):
            if not self.dead:
                self.switch()

    def call(self, effect: Callable[[], Any], lost: Exception) -> Any:
        """Do a call when it is this invocation's turn; `lost` is what the code sees of a service that does not answer."""
        assert self.parent is not None
        self.parent.switch()
        number = next(self._calls)
        kind = self._fault.kind if self._fault and self._fault.call == number else None
        if kind == "dies before":
            raise Crash
        if kind == "fails before":
            raise lost
        answer = effect()
        if kind == "dies after":
            raise Crash
        if kind == "fails after":
            raise lost
        return answer


def wire(effect: Callable[[], Any], *, lost: Exception) -> Any:
    """Every call of a service takes this way; what the test itself looks at, undisturbed."""
    here = getcurrent()
    if not isinstance(here, Invocation):
        return effect()
    Clock.moment += timedelta(milliseconds=1)
    return here.call(effect, lost)


def wired(service: object, lost: Exception) -> Any:
    return Wired(service, partial(wire, lost=lost))


@dataclass(eq=False)
class Message:
    """A message of the retrain queue, which says an action, or of the promote queue, which says a job's name."""

    says: str


class WatchedBucket(FakeBucket):
    """The artifacts bucket, which looks at every champion pointer that is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.served: list[int] = []  # every version that the pointer has named, in turn
        self.by_gate: set[int] = set()  # of these whom the gate let serve
        self.ledger: Ledger | None = None

    def put(self, key: str, data: bytes) -> None:
        before = self.pointer
        super().put(key, data)
        after = self.pointer
        if key != artifacts.champion_key(MODEL) or after is None:
            return
        self.demand_a_complete_champion()
        demand(after.before == (before.version if before else None), f"{after} took over from another than {before}")
        if after.by == "gate":
            demand(after.version not in self.served, f"the gate brought version {after.version} back")
            self.by_gate.add(after.version)
            verdict, reason = judge(self.report(after.version), after.before)
            if verdict == "shadow":
                verdict, reason = self._live_verdict(after.version, before)
            demand(verdict == "promote", f"{after} serves although: {reason}")
        self.served.append(after.version)

    def _live_verdict(self, version: int, before: Champion | None) -> tuple[Verdict, str]:
        """What annotators' answers say of a version that ran in shadow beside `before`."""
        assert self.ledger is not None
        found = [one for one in self.ledger.promotions(MODEL).values() if one.version == version and one.shadow]
        demand(bool(found), f"version {version} serves and never ran in shadow")
        running = found[0].shadow
        assert running is not None
        demand(running.champion == before, f"version {version} ran beside {running.champion}, not {before}")
        verdict, reason, _ = judge_live(running, self.ledger.pairs(MODEL, version))
        return verdict, reason

    @property
    def pointer(self) -> Champion | None:
        data = self.objects.get(artifacts.champion_key(MODEL))
        return None if data is None else msgspec.json.decode(data, type=Champion)

    def report(self, version: int) -> Evaluation:
        return msgspec.json.decode(self.objects[artifacts.evaluation_key(MODEL, version)], type=Evaluation)

    def demand_a_complete_champion(self) -> None:
        pointer = self.pointer
        if pointer is None:
            return
        onnx = self.objects.get(pointer.onnx)
        demand(onnx is not None and hashlib.sha256(onnx).hexdigest() == pointer.sha256, f"the model of {pointer} is not whole")
        demand(artifacts.evaluation_key(MODEL, pointer.version) in self.objects, f"the report of {pointer} is missing")
        demand(self.report(pointer.version).onnx_sha256 == pointer.sha256, f"{pointer} is not what was evaluated")


class WatchedSageMaker(FakeSageMaker):
    """SageMaker, which looks at every job that it is asked for."""

    def __init__(self, bucket: FakeBucket, ledger: Ledger) -> None:
        super().__init__()
        self._bucket, self._ledger = bucket, ledger

    def create_training_job(self, **request: Any) -> dict[str, Any]:
        name, digest = request["TrainingJobName"], request["HyperParameters"]["digest"]
        if name not in self.jobs and not self.refuses:
            for other, job in self.jobs.items():
                demand(job.ended, f"{name} starts while {other} runs")
                given = job.request["HyperParameters"]
                if job.status == "Completed":
                    decided = self._ledger.promotion(MODEL, given["job_name"])
                    demand(decided is not None, f"{name} starts before the gate has decided about {other}")
                    version = decided.version if decided else 0
                    demand(given["digest"] != digest or version == 0, f"{name} trains what {other} has trained")
            running = self._ledger.head(MODEL).running
            demand(running is not None and running.digest == digest, f"{name} starts without a claim")
        return super().create_training_job(**request)

    @property
    def running(self) -> list[str]:
        return [name for name, job in self.jobs.items() if not job.ended]


class Outbox:
    """The queues, and what was announced."""

    def __init__(self) -> None:
        self.retrain: list[Message] = []
        self.promote: list[Message] = []
        self.announced: set[str] = set()  # jobs whose decision everybody was told of

    def recall(self, model: str, job: str) -> None:
        self.promote.append(Message(job))

    def announce(self, decided: Promotion) -> None:
        self.announced.add(decided.job_name)
        self.retrain.append(Message("VERSION_JUDGED"))

    def put_events(self, *, Entries: list[dict[str, Any]]) -> dict[str, Any]:
        self.retrain.append(Message("VERSION_JUDGED"))
        return {"FailedEntryCount": 0}


COPIES = st.integers(0, 2)  # of a message: lost, sent, sent twice
ACCURACIES = st.sampled_from([0.5, 0.7, 0.9])
ARCHIVES = st.sampled_from(["sound", "sound", "sound", "another model file", "another job's", "damaged", "missing"])
SHADOWS = st.sampled_from([0, 0, 1, 2])  # annotated tasks that decide about a version in shadow
SAYS = st.lists(st.sampled_from(["11", "12", "12", "21", "22"]), min_size=1, max_size=4)  # both versions' labels, task by task
SPREADS = st.sampled_from([0.01, 0.3])  # of the difference of two
PICKS = st.integers(0, 5)
CALLS = st.one_of(st.just(99), st.integers(0, 16))  # that an invocation does before it is left waiting
FAULTS = st.one_of(
    st.none(),
    st.none(),
    st.builds(Fault, st.integers(0, 16), st.sampled_from(["dies before", "dies after", "fails before", "fails after"])),
)


class RetrainingMachine(RuleBasedStateMachine):
    """Annotators, queues, jobs, people and time do what they like. At the end the schedule resumes, and all must come right."""

    def __init__(self) -> None:
        super().__init__()
        Clock.moment = datetime(2026, 1, 1, tzinfo=UTC)
        dynamodb = FakeDynamoDB()
        self.bucket, self.registry, self.label_studio, self.outbox = WatchedBucket(), FakeRegistry(), FakeLabelStudio(), Outbox()
        self.ledger = Ledger("ledger", dynamodb)  # of the test; the code has one with a wire
        self.sagemaker = WatchedSageMaker(self.bucket, self.ledger)
        self.bucket.ledger = self.ledger
        self.label_studio.clock = lambda: Clock.moment
        self.ledger.set_project(MODEL, 1)

        bucket: Any = wired(self.bucket, StorageError("S3 does not answer"))
        ledger = Ledger("ledger", wired(dynamodb, TIMED_OUT))
        registry = wired(self.registry, RegistryError("MLflow does not answer"))
        self.reconciler = Reconciler(
            "local",
            CONFIGS,
            bucket,
            ledger,
            wired(self.label_studio, LabelStudioError("Label Studio does not answer")),
            Launcher(SETTINGS, wired(self.sagemaker, TIMED_OUT)),
            wired(self.outbox, ServiceError("SQS does not answer")).recall,
            log=lambda *_, **__: None,
        )
        self.promoter = Promoter(
            bucket, ledger, registry, wired(self.outbox, ServiceError("EventBridge does not answer")).announce, log=print
        )
        self.deployment = Deployment("local")
        vars(self.deployment).update(artifacts=bucket, ledger=ledger, registry=registry, outputs={"EventBus": "bus"})
        self.events = wired(self.outbox, TIMED_OUT)
        self.wired_ledger = ledger

        self.going_on: list[Invocation] = []
        self.last_task = 0
        self.edition = 0  # of the annotations
        self.asked_for: int | None = None  # the edition that Start Training was last pressed for, and heard
        self.accuracies: dict[int, float] = {}  # by version
        self.violated = False

    @initialize(turns=st.integers(0, 3))
    def begin(self, turns: int) -> None:
        for _ in range(turns):
            self.turn("sound", 0.9, 0.01, 0, ["11"], None, 99)

    @precondition(lambda self: len(self.label_studio.annotated) < MANY and len(self.going_on) < 3)
    @rule(fault=FAULTS, calls=CALLS)
    def grow(self, fault: Fault | None, calls: int) -> None:
        """Many new annotations after a long time, and a look."""
        self.annotate(len(self.label_studio.annotated) // 2 + 2, webhooks=0)
        Clock.moment += LONG
        self._begin(self._reconcile([], fault, []), calls)

    @precondition(lambda self: len(self.label_studio.annotated) < MANY and len(self.going_on) < 2)
    @rule(archive=ARCHIVES, accuracy=ACCURACIES, spread=SPREADS, in_shadow=SHADOWS, says=SAYS, fault=FAULTS, calls=CALLS)
    def turn(
        self,
        archive: Archive,
        accuracy: float,
        spread: float,
        in_shadow: int,
        says: list[str],
        fault: Fault | None,
        calls: int,
    ) -> None:
        """Whoever else may be left waiting: many new annotations, a job, a decision, predictions of a version in shadow."""
        self.grow(None, 99)
        for name in self.sagemaker.running:
            self._complete(name, archive, accuracy, spread, in_shadow)
            self._report(name, 0, 1)
            message = self.outbox.promote.pop()
            self._begin(self._decide(message, fault, [message]), calls)
        if self._running is not None:
            self.ask_in_shadow(says, None, 99)
        self._begin(self._reconcile([], None, []), 99)

    # Annotators

    @precondition(lambda self: len(self.label_studio.annotated) < MANY)
    @rule(images=st.integers(1, 3), webhooks=COPIES)
    def annotate(self, images: int, webhooks: int) -> None:
        for _ in range(images):
            self.last_task += 1
            self.label_studio.annotated.append(examples.annotated_task(self.last_task))
        self._edited(webhooks)

    @precondition(lambda self: self.label_studio.annotated)
    @rule(pick=PICKS, label=st.sampled_from(["1", "2"]), webhooks=COPIES)
    def change(self, pick: int, label: str, webhooks: int) -> None:
        place = pick % len(self.label_studio.annotated)
        task = self.label_studio.annotated[place]
        self.label_studio.annotated[place] = examples.annotated_task(task.id, label)
        self._edited(webhooks)

    @precondition(lambda self: self.label_studio.annotated)
    @rule(pick=PICKS, webhooks=COPIES)
    def delete(self, pick: int, webhooks: int) -> None:
        self.label_studio.annotated.pop(pick % len(self.label_studio.annotated))
        self._edited(webhooks)

    def _edited(self, webhooks: int) -> None:
        self.edition += 1
        self._send("ANNOTATIONS_CHANGED", webhooks)

    @rule(webhooks=COPIES)
    def press_start(self, webhooks: int) -> None:
        self._send(ASKED, webhooks)

    # Predictions

    @precondition(lambda self: self._running is not None and len(self.going_on) < 3)
    @rule(says=SAYS, fault=FAULTS, calls=CALLS)
    def ask_in_shadow(self, says: list[str], fault: Fault | None, calls: int) -> None:
        """`prelabel` notes what challenger and champion say of the tasks that come next; annotators say 1 as a rule."""
        running = self._running
        assert running is not None
        assert running.shadow is not None
        pairs = [
            ShadowPair(
                model=MODEL,
                version=running.version,
                champion=running.shadow.champion.version,
                task=task,
                sha256=examples.sha256(str(task)),
                says=[Region(label=said[0])],
                champion_says=[Region(label=said[1])],
                noted_at=now(),
            )
            for task, said in enumerate(says, start=self.last_task + 1)
        ]
        self._begin(Invocation(lambda: self.wired_ledger.note_pairs(pairs), fault, lambda _: None), calls)

    @property
    def _running(self) -> Promotion | None:
        return shadow.running(self.ledger.promotions(MODEL).values(), self.bucket.pointer)

    # Queues and functions

    def _send(self, says: str, copies: int) -> None:
        self.outbox.retrain += [Message(says) for _ in range(copies)]

    @precondition(lambda self: self.outbox.retrain)
    @rule(pick=PICKS)
    def lose(self, pick: int) -> None:
        self.outbox.retrain.pop(pick % len(self.outbox.retrain))

    @precondition(lambda self: len(self.going_on) < 3)
    @rule(picks=st.lists(PICKS, max_size=3), again=st.booleans(), fault=FAULTS, calls=CALLS)
    def reconcile(self, picks: list[int], again: bool, fault: Fault | None, calls: int) -> None:
        """Deliver some messages, which may be delivered `again` although all goes well; without any the schedule looks."""
        if not self.outbox.retrain or not picks:
            self._send("SCHEDULE", 1)
        queue = self.outbox.retrain
        messages = list(dict.fromkeys(queue[pick % len(queue)] for pick in picks)) or queue[-1:]
        for message in [] if again else messages:
            queue.remove(message)
        self._begin(self._reconcile(messages, fault, [] if again else messages), calls)

    def _reconcile(self, messages: list[Message], fault: Fault | None, back: list[Message]) -> Invocation:
        asked, edition = any(message.says == ASKED for message in messages), self.edition

        def ended(well: bool) -> None:
            if not well:
                self.outbox.retrain += back
            elif asked:
                self.asked_for = edition if edition == self.edition else None

        return Invocation(lambda: self.reconciler.reconcile(MODEL, asked=asked), fault, ended)

    @precondition(lambda self: self.outbox.promote and len(self.going_on) < 3)
    @rule(pick=PICKS, again=st.booleans(), fault=FAULTS, calls=CALLS)
    def decide(self, pick: int, again: bool, fault: Fault | None, calls: int) -> None:
        message = self.outbox.promote[pick % len(self.outbox.promote)]
        if not again:
            self.outbox.promote.remove(message)
        self._begin(self._decide(message, fault, [] if again else [message]), calls)

    def _decide(self, message: Message, fault: Fault | None, back: list[Message]) -> Invocation:
        def ended(well: bool) -> None:
            self.outbox.promote += [] if well else back

        return Invocation(lambda: self.promoter.decide(MODEL, message.says), fault, ended)

    @precondition(lambda self: len(self.bucket.served) > 0 and len(self.going_on) < 3)
    @rule(version=st.integers(0, 4), fault=FAULTS, calls=CALLS)
    def move_the_pointer(self, version: int, fault: Fault | None, calls: int) -> None:
        """A person lets any version serve; with 0 the one from before."""
        if version:
            work = partial(takeover.promote, self.deployment, MODEL, version, "because", self.events)
        else:
            work = partial(takeover.rollback, self.deployment, MODEL, None, "because", self.events)
        self._begin(Invocation(work, fault, lambda _: None), calls)

    def _begin(self, invocation: Invocation, calls: int) -> None:
        self.going_on.append(invocation)
        self._go_on(invocation, calls)

    def _go_on(self, invocation: Invocation, calls: int) -> None:
        try:
            invocation.go_on(calls)
        except Violation:
            self.violated = True
            raise
        if invocation.dead:
            self.going_on.remove(invocation)

    @precondition(lambda self: self.going_on)
    @rule(turns=st.lists(st.tuples(st.integers(0, 2), CALLS), min_size=1, max_size=6))
    def go_on(self, turns: list[tuple[int, int]]) -> None:
        for pick, calls in turns:
            if self.going_on:
                self._go_on(self.going_on[pick % len(self.going_on)], calls)

    # Jobs

    @precondition(lambda self: self.sagemaker.running)
    @rule(
        archive=ARCHIVES,
        accuracy=ACCURACIES,
        spread=SPREADS,
        in_shadow=SHADOWS,
        reports=st.tuples(COPIES, COPIES),
    )
    def complete(self, archive: Archive, accuracy: float, spread: float, in_shadow: int, reports: tuple[int, int]) -> None:
        name = self.sagemaker.running[0]
        self._complete(name, archive, accuracy, spread, in_shadow)
        self._report(name, *reports)

    @precondition(lambda self: self.sagemaker.running)
    @rule(status=st.sampled_from(["Failed", "Stopped"]), archive=st.booleans(), reports=st.tuples(COPIES, COPIES))
    def fail(self, status: str, archive: bool, reports: tuple[int, int]) -> None:
        """A job that is stopped may have left a model: SageMaker keeps what lies there at the end of its time."""
        name = self.sagemaker.running[0]
        if archive and status == "Stopped":
            self._leave_archive(name, "sound", 0.9, 0.01)
        self.sagemaker.jobs[name].status = status
        self._report(name, *reports)

    @precondition(lambda self: any(job.ended for job in self.sagemaker.jobs.values()))
    @rule(pick=PICKS, reports=st.tuples(COPIES, COPIES))
    def report_again(self, pick: int, reports: tuple[int, int]) -> None:
        ended = [name for name, job in self.sagemaker.jobs.items() if job.ended]
        self._report(ended[pick % len(ended)], *reports)

    @rule(refuses=st.sampled_from([None, "ResourceLimitExceeded", "ValidationException"]))
    def refuse_jobs(self, refuses: str | None) -> None:
        self.sagemaker.refuses = refuses

    def _complete(self, name: str, archive: Archive, accuracy: float, spread: float, in_shadow: int = 0) -> None:
        self._leave_archive(name, archive, accuracy, spread, in_shadow)
        self.sagemaker.jobs[name].status = "Completed"

    def _leave_archive(self, name: str, archive: Archive, accuracy: float, spread: float, in_shadow: int = 0) -> None:
        if archive == "missing":
            return
        given = self.sagemaker.jobs[name].request["HyperParameters"]
        name = given["job_name"]
        version = len(self.accuracies) + 1
        self.accuracies[version] = accuracy
        champion = int(given["champion_version"]) if given["champion_version"] else None
        onnx = f"the model of {name}".encode()
        report = examples.evaluation(
            version,
            accuracy,
            champion=examples.scores(champion, self.accuracies[champion]) if champion else None,
            compared=examples.comparison(accuracy, self.accuracies[champion], spread=spread) if champion else None,
            job_name="another" if archive == "another job's" else name,
            onnx_file=onnx,
        )
        report = msgspec.structs.replace(
            report,
            holdout=report.holdout[:1],  # judged is the comparison; the images only take time
            dataset_digest=given["digest"],
            gate=GateRules(margin=0.02, class_floor=0.1, confidence=0.5, shadow=in_shadow),
            n_annotations=int(given["n_annotations"]),
            champion_annotations=int(given["champion_annotations"]) if champion else None,
        )
        packed = examples.model_archive(report, b"another" if archive == "another model file" else onnx)
        self.bucket.put(artifacts.training_archive_key(MODEL, name), packed[:-40] if archive == "damaged" else packed)

    def _report(self, name: str, to_retrain: int, to_promote: int) -> None:
        self._send("TRAINING_ENDED", to_retrain)
        given = self.sagemaker.jobs[name].request["HyperParameters"]
        self.outbox.promote += [Message(given["job_name"]) for _ in range(to_promote)]

    @rule(minutes=st.sampled_from([1, 11, 25 * 60]))
    def wait(self, minutes: int) -> None:
        Clock.moment += timedelta(minutes=minutes)

    @precondition(lambda self: artifacts.index_key(MODEL) in self.bucket.objects)
    @rule(left=st.integers(0, 40_000))
    def cut_the_index(self, left: int) -> None:
        """The index of annotated tasks is damaged, or a person empties it."""
        kept = self.bucket.objects[artifacts.index_key(MODEL)]
        self.bucket.put(artifacts.index_key(MODEL), kept[:left])

    # What holds

    @invariant()
    def holds(self) -> None:
        try:
            self._demand_a_sound_ledger()
            self.bucket.demand_a_complete_champion()
            demand(len(self.sagemaker.running) <= 1, f"{self.sagemaker.running} run at once")
        except Violation:
            self.violated = True
            raise

    def _demand_a_sound_ledger(self) -> None:
        """It points to no job that cannot exist, and forgets none that does."""
        head, trainings = self.ledger.head(MODEL), self.ledger.trainings(MODEL)
        jobs = {job.request["HyperParameters"]["job_name"]: job.status for job in self.sagemaker.jobs.values()}
        status = {training.job.job_name: training.status for training in trainings}
        noted = [training.job for training in trainings if training.status == "running"]
        demand(noted == ([head.running] if head.running else []), f"{noted} are noted as running, {head.running} is")
        for training in trainings:
            job = training.job
            manifest = self.bucket.get(artifacts.manifest_key(MODEL, job.digest))
            whole = manifest is not None and hashlib.sha256(manifest).hexdigest() == job.digest
            demand(whole, f"the manifest of {job} is missing")
            demand(job.champion_version is None or job.champion_version in self.bucket.served, f"{job} meets no champion")
            ended = jobs.get(job.job_name) == training.status.capitalize()
            demand(ended or job == head.running, f"{training} is {jobs.get(job.job_name)}")
        for name, state in jobs.items():
            known = state not in ("InProgress", "Stopping") or (head.running is not None and head.running.job_name == name)
            demand(known, f"{name} runs, and the ledger points to {head.running}")
        demand(head.trained is None or status[head.trained.job_name] == "completed", f"{head.trained} was never completed")
        demand(head.failure is None or status[head.failure.job_name] in ("failed", "stopped"), f"{head.failure} never failed")

    def teardown(self) -> None:
        if not self.violated:
            self._resume()
            self.holds()
            self._demand_that_all_is_done()

    def _resume(self) -> None:
        """Whoever waits goes on; then nothing fails any more, the schedule looks, and jobs run to their end without a report."""
        self.sagemaker.refuses = None
        while self.going_on:
            self._go_on(self.going_on[0], 99)
        for _ in range(20):
            Clock.moment += LONG
            before = self.ledger.head(MODEL)
            self._send("SCHEDULE", 1)
            while self.outbox.retrain or self.outbox.promote:
                if self.outbox.retrain:
                    self._do(self._reconcile([self.outbox.retrain.pop()], None, []))
                else:
                    self._do(self._decide(self.outbox.promote.pop(), None, []))
            running = self.sagemaker.running
            for name in running:
                self._complete(name, "sound", 0.9, 0.01)
            if self.ledger.head(MODEL) == before and not running:
                return
        raise Violation(f"there is no end of it: {self.ledger.trainings(MODEL)}")

    def _do(self, invocation: Invocation) -> None:
        self._begin(invocation, 99)
        demand(invocation.dead and invocation.failure is None, f"a message fails for ever: {invocation.failure}")

    def _demand_that_all_is_done(self) -> None:
        head, trainings = self.ledger.head(MODEL), self.ledger.trainings(MODEL)
        demand(head.running is None and not head.asked, f"{head} waits for ever")
        snapshot, rows = snapshot_index.freeze(self.label_studio.annotated, CONFIG, examples.LABELS)
        same = [training for training in trainings if training.job.digest == snapshot.digest]
        decision = decide(CONFIG.retrain, head, snapshot.n_annotations, Clock.now())
        trained = any(training.status == "completed" for training in same)
        failed = head.failure is not None and head.failure.digest == snapshot.digest
        demand(trained or failed or not decision.train, f"never started: {decision.reason}")
        demand(bool(same) or not rows or self.asked_for != self.edition, "never started, though asked for")
        for training in trainings:
            name = training.job.job_name
            if training.status == "completed":
                demand(self.ledger.promotion(MODEL, name) is not None, f"the gate never decides about {name}")
                demand(name in self.outbox.announced, f"nobody is told of {name}")
        self._demand_that_shadows_end()

    def _demand_that_shadows_end(self) -> None:
        """One at most runs on, because too little is known; and whom the gate let serve is said to have been promoted."""
        running = self._running
        annotated = {task.id for task in self.label_studio.annotated}
        for promoted in self.ledger.promotions(MODEL).values():
            if promoted.verdict == "shadow":
                demand(promoted == running, f"{promoted} runs in shadow for ever")
            elif promoted.shadow is not None:
                serves = promoted.version in self.bucket.by_gate
                demand((promoted.verdict == "promote") >= serves, f"the gate let it serve: {promoted}")
        if running is not None and running.shadow is not None:
            pairs = self.ledger.pairs(MODEL, running.version)
            demand(judge_live(running.shadow, pairs)[0] == "shadow", f"nobody decides about {running}")
            left = [pair for pair in pairs if pair.task in annotated and not pair.scored]
            demand(not left, f"nobody scores {left}")


def run(examples: int, *, phases: tuple[Phase, ...] = (Phase.generate, Phase.shrink), derandomize: bool = True) -> None:
    run_state_machine_as_test(
        RetrainingMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=20,
            phases=phases,
            derandomize=derandomize,
            database=None,
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still but for the machine's."""
    monkeypatch.setattr("labelloop.records.datetime", Clock)
    monkeypatch.setattr("labelloop.retrain.datetime", Clock)
    monkeypatch.setattr("labelloop.retrain.time", SimpleNamespace(sleep=lambda _: None))
    moment = SimpleNamespace(time=lambda: Clock.moment.timestamp(), monotonic=lambda: Clock.moment.timestamp())
    monkeypatch.setattr("labelloop.snapshot_index.time", moment)


def test_whatever_happens_the_loop_comes_right() -> None:
    run(1_000)


def test_an_index_that_took_two_looks_is_built_anew_an_hour_after_a_task_has_gone() -> None:
    """Found by a random history, when the index's hour was the machine's and not the history's."""
    state = RetrainingMachine()
    state.begin(turns=1)
    state.cut_the_index(left=0)
    state.press_start(webhooks=1)
    state.grow(calls=99, fault=Fault(7, "fails before"))
    state.grow(calls=8, fault=None)
    state.delete(pick=0, webhooks=0)
    state.teardown()


@pytest.mark.slow
@pytest.mark.timeout(3_600)
def test_whatever_else_happens_the_loop_comes_right() -> None:
    run(10_000, derandomize=False)


def any_head_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger writes over whatever head is there, not only over the one that was read."""
    advance = Ledger._advance

    def over_whatever(ledger: Ledger, before: Head, after: Head, training: Training | None) -> None:
        there = ledger.head(before.model)
        advance(ledger, msgspec.structs.replace(before, sequence=there.sequence), after, training)

    monkeypatch.setattr(Ledger, "_advance", over_whatever)


def a_name_without_the_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retrain, "job_name", lambda stage, model, digest, _: job_name(stage, model, digest, 1))


def a_name_of_its_own_for_every_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """SageMaker cannot tell that a job was started already; its state is that of the last start."""
    numbers, names, state = count(1), dict[str, str](), Launcher.state

    def renamed(settings: Settings, config: ModelConfig, job: Job, champion: Champion | None, machine: str) -> dict[str, Any]:
        names[job.job_name] = f"{job.job_name}-{next(numbers)}"
        return {**training_request(settings, config, job, champion, machine), "TrainingJobName": names[job.job_name]}

    monkeypatch.setattr(launcher, "training_request", renamed)
    monkeypatch.setattr(Launcher, "state", lambda self, name: state(self, names.get(name) or name))


def no_start_after_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was claimed and never started is waited for."""
    settle = Reconciler._settle

    def wait(self: Reconciler, model: str, head: Head) -> Head:
        never_started = head.running is not None and self._launcher.state(head.running.job_name) is None
        return head if never_started else settle(self, model, head)

    monkeypatch.setattr(Reconciler, "_settle", wait)


def no_end_of_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claimed job is taken for ended when SageMaker does not know it yet."""
    settle = Reconciler._settle

    def forget(self: Reconciler, model: str, head: Head) -> Head:
        never_started = head.running is not None and self._launcher.state(head.running.job_name) is None
        return msgspec.structs.replace(head, running=None) if never_started else settle(self, model, head)

    monkeypatch.setattr(Reconciler, "_settle", forget)


def no_waiting_for_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reconciler, "_busy", lambda _self, _model, head: "a job is running" if head.running else None)


def no_second_look_at_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """An end that `promote` never saw is waited for."""
    monkeypatch.setattr(retrain, "_PROMOTION_GRACE", timedelta.max)


def any_pointer_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The champion pointer is written over whatever is there, not only over the one that was read."""

    def put(self: Champions, champion: Champion, *, tag: str | None) -> None:
        self._artifacts.put(artifacts.champion_key(champion.model), msgspec.json.encode(champion))

    monkeypatch.setattr(Champions, "swap", put)


def any_model_file_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The archive's model is not compared with the SHA-256 of its report."""
    monkeypatch.setattr(promotion, "hashlib", SimpleNamespace(sha256=lambda _: SimpleNamespace(hexdigest=lambda: ANY)))


def no_look_at_shadows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody scores a version in shadow, and nobody ends its run."""
    monkeypatch.setattr(Reconciler, "_follow_shadow", lambda _self, _model: None)


@pytest.mark.parametrize(
    "break_guard",
    [
        any_head_will_do,
        a_name_without_the_attempt,
        a_name_of_its_own_for_every_start,
        no_start_after_a_crash,
        no_end_of_a_job,
        no_waiting_for_the_gate,
        no_second_look_at_the_gate,
        any_pointer_will_do,
        any_model_file_will_do,
        no_look_at_shadows,
    ],
)
def test_a_broken_guard_is_found(monkeypatch: pytest.MonkeyPatch, break_guard: Callable[[pytest.MonkeyPatch], None]) -> None:
    """So that the test above can fail."""
    break_guard(monkeypatch)
    with pytest.raises(Violation):
        run(10_000, phases=(Phase.generate,))  # it ends with the first that is found
