"""What a privacy report says in words: who sees what, what is not protected, what a signature cannot show.

Sentences for people who read no code, in one place for page, machine-readable report and documentation. Each is a
fact about this version of the software; whoever changes the fact changes the sentence.
"""

from dataclasses import dataclass

EVALUATION_NOTICE = (
    "Computed from the raw data for the person running the simulation; not covered by epsilon; do not publish."
)


@dataclass(frozen=True, kw_only=True)
class Viewpoint:
    """One row of the table "who sees what".

    Attributes:
        who: Somebody.
        sees: What reaches them.
        means: What they are trusted with, or what protects against them.
    """

    who: str
    sees: str
    means: str


def who_sees_what(users_per_node: int | None, *, is_private: bool, statistics: bool = False) -> tuple[Viewpoint, ...]:
    """The table "who sees what".

    Args:
        users_per_node: The most users that one node of the registry hosts; None where there is no registry yet.
        is_private: Whether the ledger's releases promise anything.
        statistics: Whether rounds asked for the statistics of AMHT-LRS.
    """
    second_moments = (
        " This ledger has rounds of AMHT-LRS, whose statistics hold more: from a node with one user the server could "
        "also compute X'X, the second moments of that user's features: which features the examples have, and how "
        "often together; and where a round uses one example of that user, what this example is."
        if statistics
        else ""
    )
    return (
        Viewpoint(
            who="Anyone who reads the release",
            sees="The shared model and the noised sums of every round, this ledger and this report.",
            means="This is what the promise covers: none of it depends on one user beyond epsilon and delta."
            if is_private
            else "NOT PRIVATE: nothing limits what they can learn about one user.",
        ),
        Viewpoint(
            who="The server that adds the noise",
            sees="Each node's clipped sum before the noise. From a node with one user it could compute that user's "
            "personal weights, and which entries of the personal sparse part are not zero, almost exactly; "
            f"from a node with many users it sees only their sum.{second_moments}{_largest_node(users_per_node)}",
            means="Trusted not to look or keep: this is what central trust means.",
        ),
        Viewpoint(
            who="The message broker (SuperLink), its database, proxies and their operators",
            sees="Contributions sealed to a key that lives for one release, all of one size; who is asked, answers and "
            "when.",
            means="Not trusted with contributions: what they copy can never be opened once the round is over. They can "
            "hold messages back, and whoever may start runs there can send code to nodes that accept it.",
        ),
        Viewpoint(
            who="A node",
            sees="The raw data and the personal models of its own users, and every shared model.",
            means="Trusted by its own users to clip and to count. A node that misbehaves can break the promise to its "
            "own users only, and move a sum by at most its number of users times the clipping norm.",
        ),
        Viewpoint(
            who="Another user, another node",
            sees="The shared models, like anyone. No message has a field for a personal model.",
            means="Covered by the promise." if is_private else "NOT PRIVATE, as above.",
        ),
        Viewpoint(
            who="Whoever runs a simulation",
            sees="Everything, the raw data included: all nodes are on that machine.",
            means="Trusted with the data anyway. The evaluation is computed for that person.",
        ),
    )


UNPROTECTED = (
    "Who is registered, who is invited, who answers and when.",
    "When each line of the ledger was written, to the second.",
    "How many users there are in all and on each node.",
    "Why a node refused to answer: refusals carry a public code, which never depends on a user's data.",
    "Names, declared ranges and vocabularies of features, the range of the target, and every setting of the run.",
    "Flower's own metadata, for example the time a node took, which goes out with its replies.",
    "What the model says about people in general, which may also be true of people who took no part.",
    "Anything that was published about the same people without being charged to this ledger.",
)
"""What epsilon does not cover."""

SIGNATURE_LIMITS = (
    "That the key belongs to the owner. Compare it with the key the owner has published elsewhere.",
    "That the end was not cut off. Compare the head with one that somebody remembers: an earlier report, a node.",
    "That the noise was drawn as the ledger says, and that nodes clipped as they should. "
    "That is a matter of the software and of tests of it. Nodes that run whatever code the server ships hold their "
    "limits against mistakes, not against a malicious server.",
    "That the model file is the one that was trained, where nobody recomputed it: the ledger commits to the noised "
    "sums, from which the model follows, and an audit of the whole run folder takes every step again; the file itself "
    "is not signed, so in a release folder alone changed bytes in it are not noticed.",
    "That everything done with these people's data was charged here. A second ledger is invisible to the first.",
    "That registered users are different people.",
    "What was in lines that a RESTORE line stands for. They are charged as releases with the least noise that the "
    "ledger knows of; a lost run with less noise is not.",
    "That an attack which this page shows was made on this run: its file is not signed. Make it again.",
    "That this page is what the ledger says. Recompute it from the ledger.",
)
"""What remains to be trusted after every signature is found valid."""


def tuning_note(runs: int, releases: int) -> str:
    """Whether the choice of settings is covered."""
    started = "one run" if runs == 1 else f"{runs} runs"
    return (
        "Settings such as rank, sparsity or the number of rounds are not private data, but choosing them by comparing "
        f"runs on the same people spends privacy. Such runs are covered if they were charged to this ledger, which has "
        f"{started} with {releases} charged rounds; runs on other ledgers are not. Settings chosen by looking at raw "
        "data, or at the errors of an evaluation, are not covered at all. An adaptive clipping norm is covered: it "
        "follows from noised numbers of the rounds before."
    )


def _largest_node(users_per_node: int | None) -> str:
    if users_per_node is None:
        return ""
    users = "one user" if users_per_node == 1 else f"{users_per_node:,} users"
    return f" The largest node here hosts {users}."
