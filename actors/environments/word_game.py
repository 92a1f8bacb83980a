"""A word chain for two: each word begins with the last letter of the one before, and no word comes twice. The first
player without a word loses. The opponent is deterministic: what it knows and says depends on the seed alone."""

from __future__ import annotations

import random
import re

from actors.environments.contract import Step, Task

WORDS = """
acid acorn actor agent album anchor angel ankle ant apple apron arch arena arm arrow ash atlas attic aunt axis baby
badge bag ball band bank barn basket bath beach bean bear bed bee bell belt bench bird boat body bone book boot bottle
bowl box boy brain branch bread brick bridge broom brush bucket bus button cabin cable cake camel camp candle candy
cap car card cat cave chain chair chalk cheese chest child church circle city clay clock cloud coat coin comb cook
corn cow crab crown cup curtain dance day deer desk diamond dinner dish doctor dog doll door dragon drawer dream dress
drum duck dust eagle ear earth east echo edge egg elbow elephant engine error evening event eye face family fan farm
father feather fence field finger fire fish flag floor flower fly fog foot forest fork fox frog fruit game garage
garden gate ghost giant gift girl glass glove goat gold grape grass guest guitar hair hall hammer hand harbor hat hawk
heart hen hill hole honey horn horse hotel house ice idea image inch ink insect iron island ivory ivy jacket jar jelly
jewel job joke judge juice jungle jury kettle key king kiss kitchen kite kitten knee knife knot ladder lake lamb lamp
leaf leg lemon letter lion lip lizard lock log lunch machine magnet map market mask meal milk mirror money monkey moon
mother mountain mouse mouth movie mud nail name neck needle nest net night noise noon north nose note nurse nut oak
ocean office oil olive onion orange orbit oven owl ox page paint palace pan paper park path pear pen pencil piano
picture pig pilot pin pipe plane plant plate pocket poem pond potato queen question quilt rabbit radio rain ram rat
ring river road robot rock roof room root rope rose ruler salt sand school sea seed sheep shelf ship shirt shoe shop
silk sister sky snake snow soap sock song soup spider spoon star stone storm street sugar sun table tail tea tent test
thumb tiger time toe tomato tool tooth town toy train tree truck uncle unit urn valley van vase vest view village
violin voice wagon wall watch water wave west wheel wind window wing winter wolf wood wool xylophone yard yarn year
yellow zebra zero zone zoo
""".split()  # fmt: skip
_WORD = re.compile(r"[a-z]+")


class WordGame:
    """Reward parts: `word`, for each word that fits, and `win`, 1 if the opponent has no answer. A word that does not
    fit ends the episode.

    Args:
        known: share of the words that the opponent knows.
        word_reward: for each word that fits.
    """

    def __init__(self, known: float = 0.3, word_reward: float = 0.1) -> None:
        self._known, self._word_reward = known, word_reward
        self._opponent: list[str] = []
        self._used: list[str] = []

    def reset(self, prompt: Task) -> str:
        generator = random.Random(prompt.seed)
        self._opponent = generator.sample(WORDS, max(1, round(self._known * len(WORDS))))
        self._used = [self._opponent.pop(0)]
        return (
            "Let us play word chain. Say one common English noun that begins with the last letter of my word. No word "
            f"may be said twice. Answer with the word alone. My word is: {self._used[-1]}"
        )

    def step(self, action: str) -> Step:
        words = _WORD.findall(action.lower())
        word = words[0] if len(words) == 1 else ""
        letter = self._used[-1][-1]
        if word not in WORDS or word in self._used or not word.startswith(letter):
            return "", {"word": 0.0, "win": 0.0}, True, {"word": word, "fits": False}
        self._used.append(word)
        answer = next((known for known in self._opponent if known not in self._used and known[0] == word[-1]), None)
        reward = {"word": self._word_reward, "win": float(answer is None)}
        if answer is None:
            return "", reward, True, {"word": word, "fits": True}
        self._used.append(answer)
        return answer, reward, False, {"word": word, "fits": True}
