"""A text of several kinds, to measure a model's queries on before any prompt is read."""

TEXT = """\
The hive stood at the edge of an orchard, where the wind came over the wall and the rain did not.
In April its keeper lifted the lid for the first time since October, and counted the frames that
were covered with bees: five on one side, two on the other, and between them a patch of brood no
larger than a hand. "They are late this year," she said, "but they are not few. Give them syrup,
and leave them alone for a week." Her son wrote it down, with the date and the weather.

How does a colony decide where to live? When a swarm has left its old home, it hangs in a tree for
some hours or some days, and a few hundred scouts look at holes in the neighbourhood. A scout that
has found a good one comes back and dances: the longer and the livelier, the better she thinks it
is. Others follow her, look for themselves, and dance in turn. Dances for poor places end sooner.
So the better place gains followers, although no bee has seen both, and once about fifteen scouts
meet at one entrance, the search is over and the whole swarm takes wing. Three conditions make this
work: every scout judges for herself, she reports what she saw and not what others say, and her
enthusiasm fades with time. A committee could do worse.

Notes for the spring inspection:
1. Weigh the hive. Less than 15 kg means that stores are low.
2. Look for eggs; where there are some, the queen was there within three days.
3. Replace the two oldest frames.
4. Count mites on the board: 0 to 3 a day is fine, 10 or more is not.

def frames_needed(bees: int, per_frame: int = 2000) -> int:
    \"\"\"Frames that so many bees cover, at least one.\"\"\"
    if bees < 0:
        raise ValueError(f"a hive cannot hold {bees} bees")
    return max(1, -(-bees // per_frame))

print([frames_needed(count) for count in (0, 1_500, 12_000, 41_000)])  # [1, 1, 6, 21]

Dear Mr. Lindqvist, thank you for your letter of 3 May. We are sorry to hear that the parcel was
damaged on its way. Please keep the jars that are whole; for the other four we have sent you the
price, 38.40 in all, which should reach your account by Friday. If it does not, call us between nine
and five. Kind regards, the shop.

Question: A jar holds 450 g of honey, and a good year yields 27 kg. How many jars are filled, and
what do they bring at 9.60 each? Answer: 27 kg are 27,000 g, and 27,000 / 450 = 60, so sixty jars
are filled. They bring 60 * 9.60 = 576. If six of them are given away, 54 are left, and those bring
518.40.

In the evening the boy read his notes aloud, and his mother corrected two numbers. The first was
the weight, which he had written without the lid; the second was the count of mites. Then they shut
the book, because it had grown dark, and went to look whether the bees had taken the syrup.
"""
