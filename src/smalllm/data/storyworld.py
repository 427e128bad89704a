"""A small world of children's stories: a seeded grammar that writes them, scores them exactly and checks them.

One grammar, given as data below, serves three readers, so that they cannot disagree:

* writing: `story` and `stories` draw every choice uniformly from its alternatives;
* scoring: `log2_probability` finds the one derivation of a text and adds up the bits of its choices;
* checking: `check` follows a text and notes each reference that contradicts the story so far.

Every text has at most one derivation (`defects` proves it for the grammar as written), therefore the sum of the bits
is the exact information content of a story and the mean over stories is the entropy: no model can do better.

This module knows nothing about tokens, models or files.

How to read the grammar. `name:` opens a rule and each `- ` line is one equally likely alternative.

    [bird]          one word of the table or one alternative of the rule `bird`
    [bird.a]        the same in another form: `a` = "a wren", `A` = "A wren", `cap` = "Wren"
    [toy=toys]      the same, remembered as `toy`
    [smell!x]       any word of the table but the one remembered as `x`
    {toy}           the remembered word again
    {f.he} {he}     the pronoun of the friend `f`; without a name in front, of the hero `h`
    [end:lost]      the rule `end`, where `*` stands for `lost`
    <race>          the name of the plot; no text
    /               a new paragraph
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

WORLD_VERSION = 1
"""Bumped whenever the same (seed, index) gives another text."""

# --- The grammar ----------------------------------------------------------------------------------------------------

PLAIN = """
weather: sunny, bright, breezy, misty, cloudy, golden, windy, quiet, clear, mild, lovely, dewy, calm, fresh, glorious,
    drowsy, sparkling, peaceful, pleasant, hazy, cool, silvery, fine, blustery
part: morning, afternoon
trait: kind, curious, cheerful, clever, gentle, merry, playful, dreamy, helpful, lively, tidy, modest, bouncy, friendly,
    thoughtful, polite, busy, jolly, eager, adventurous, imaginative, giggly, bright-eyed, sensible, good-natured,
    warm-hearted, funny, talkative, careful, musical, energetic, affectionate
cosy: cosy, tiny, crooked, sunny, snug, round, old, little, tall, bright, narrow, wooden, mossy, thatched, painted,
    pretty, neat, whitewashed, humble, ivy-covered, rambling, charming, lopsided, weathered
wild: blue, famous, misty, windy, shady, quiet, pretty, peaceful, silver, sleepy, golden, sparkling, breezy, lonely, lovely,
    whispering
beside: beside, near, close to, not far from, just beyond, overlooking
relative: sister, brother, cousin, neighbour, grandparents, twin cousins, classmates, big sister, little brother,
    nieces
kin: sister, brother, cousin, neighbour, teacher, big sister, big brother, little cousin
hobby: painting pictures, reading books, baking bread, singing songs, building towers, telling stories, drawing maps,
    knitting socks, playing checkers, making puppets, writing poems, beating drums, stringing beads, folding paper,
    solving riddles, sorting buttons, playing the fiddle, mending clocks, sewing cushions, stirring soup,
    polishing spoons, reciting rhymes, inventing games, collecting stamps, carving whistles, weaving baskets
outdoor: climbing trees, chasing butterflies, splashing in puddles, flying kites, picking berries, skipping stones,
    watching clouds, digging holes, rolling down hills, feeding ducks, gathering acorns, jumping rope,
    sailing paper boats, looking for shells, building dens, swinging on gates, catching leaves, exploring caves,
    following trails, wading in streams, searching for fossils, picking mushrooms, rowing boats, fishing for minnows,
    hunting for treasure, riding ponies
eyes: brown, blue, green, grey, hazel, amber, dark, twinkling
smile: shy, wide, warm, dimpled, bright, crooked, gentle, cheeky, toothy, sweet, sunny, quick, merry, dazzling, radiant,
    mischievous
pocketful: pebbles, buttons, acorns, marbles, feathers, crumbs, shells, ribbons, seeds, chestnuts, beads, corks,
    peppermints, pine cones, coins, crayons, conkers, twigs, raisins, toffees
wear: boots, trousers, socks, gloves, mittens, dungarees, pyjamas, sandals
birds: robins, wrens, blackbirds, sparrows, finches, larks, thrushes, cuckoos, doves, swallows, jays, magpies,
    starlings, woodpeckers, nightingales, goldfinches
sing: singing, chirping, twittering, whistling, chattering, trilling, humming, warbling, cheeping, calling, piping,
    tweeting
tree: birch, oak, willow, chestnut, maple, elm, ash, beech, cherry, apple, pear, plum, hazel, alder, rowan, poplar
smell: clover, hay, mint, lavender, honey, pine, roses, thyme, violets, moss, jasmine, warm earth, ripe plums,
    fresh bread, wet grass, wood smoke, lilac, rosemary, sea salt, honeysuckle, camomile, toast, peppermint, blossom,
    cinnamon, oranges, fir cones, apples
bug: butterfly, bee, dragonfly, ladybird, bumblebee, beetle, moth, grasshopper, firefly, cricket
flowers: daisies, tulips, poppies, bluebells, buttercups, foxgloves, lilies, violas, primroses, snowdrops, daffodils,
    pansies, marigolds, cornflowers, irises, asters, hollyhocks, peonies, crocuses, forget-me-nots, geraniums,
    dahlias, zinnias, cowslips
petal: yellow, pale, white, bright, pink, tall, fragrant, wild, velvety, nodding, fresh, blue, dewy, purple, dainty,
    red, sweet, crimson, fading, golden, starry, lovely, scented, tiny
critter: toad, frog, newt, lizard, worm, hare, goose, hen, donkey, goat, pony, calf, turtle, weasel, shrew, vole,
    pheasant, rooster, duck, swan, heron, dormouse, tortoise, peacock, cow, sheep, pigeon, raven
fluffy: tiny, sleepy, fluffy, plump, speckled, fuzzy, shaggy, grumpy, spotted, shiny, dusty, nosy, sturdy, jolly,
    handsome, comical, bashful, solemn, nimble, hungry, ragged, elegant, wobbly, freckled, frisky, startled, puzzled,
    muddy, wrinkled, chubby, graceful, glossy, proud, charming, scruffy, dainty, merry, dignified, cheeky, noisy,
    lonely, restless, cuddly, peculiar, curious, stubborn, bewildered, stripy
number: two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, twenty
shape: castles, dragons, whales, ships, elephants, feathers, teacups, snowmen, mushrooms, giraffes, pillows, kings,
    turtles, sheep, swans, mountains, balloons, dolphins, camels, kettles, hippos, wagons, peacocks, islands,
    pirates, fairies, puddings, comets, mermaids, unicorns
big_adj: huge, crooked, mossy, ancient, dusty, shadowy, grey, lopsided, old, dark, muddy, leaning, forgotten, mysterious,
    tall, little, lonely, sunlit, round, shabby, weathered, damp, strange, low, battered, enormous, small, funny,
    sturdy, bent, brown, shady
spot_noun: bench, bush, wheelbarrow, fountain, barrel, woodpile, shed, hedge, well, statue, scarecrow, signpost, boulder,
    trunk, fence, wall, gate, haystack, stump, trough, cart, ladder, log, beehive, pump, crate, sundial, birdbath,
    rock, tree, post, bucket
looked: looked, peered, peeked, searched, poked about, hunted, rummaged, peeped
hurrying: hurrying, skipping, hopping, trotting, strolling, shuffling, waddling, bouncing, wandering, ambling, puffing,
    tiptoeing, bustling, marching, pottering, scampering
went: hurried, skipped, hopped, trotted, strolled, wandered, walked, ran, ambled, marched, raced, tiptoed, rambled,
    danced, bounced, scampered
elder: old, wise, friendly, helpful, kindly, sprightly, cheery, patient, smiling, grey-haired, stout, neighbourly,
    twinkly, gentle, polite, whiskery
kindly: softly, kindly, warmly, gently, brightly, politely, quietly, cheerfully, sweetly, calmly, tenderly,
    earnestly, patiently, thoughtfully, firmly, sincerely, simply, fondly, wisely, generously, solemnly, graciously,
    lovingly, honestly
happily: happily, proudly, joyfully, merrily, gladly, loudly, excitedly, eagerly, delightedly, breathlessly, cheerily,
    gleefully, heartily, blissfully, jubilantly, triumphantly, wildly, playfully, grandly, gaily, jauntily,
    sweetly, warmly, brightly
slowly: slowly, quickly, carefully, silently, steadily, bravely, nervously, swiftly, cautiously, briskly, lightly,
    hastily, boldly, quietly, hopefully, timidly, nimbly, calmly, clumsily, dreamily, patiently, gingerly, eagerly,
    thoughtfully
sadly: sadly, quietly, tearfully, glumly, miserably, softly, gloomily, mournfully, shakily, wearily, faintly, unhappily,
    hoarsely, bitterly, meekly, weakly
swiftly: quickly, swiftly, hastily, at top speed, like the wind, in a flash, without a word, as fast as possible
said: said, cried, exclaimed, cheered, called, laughed, sang, shouted
replied: said, answered, replied, murmured, whispered, explained
wept: wept, sobbed, sniffed, wailed, sighed, whimpered, groaned, mumbled
hooray: Hooray, Hurrah, Wonderful, Goodness, Splendid, Marvellous, Bravo, Yippee, Fantastic, Perfect, Magnificent, Wow,
    Superb, Hip hip hooray, How lovely, Oh my, Amazing, Brilliant, Gracious, Terrific, Well I never, Good heavens,
    What joy, Yes
ohno: Oh no, Oh dear, Dear me, Goodness me, Oh bother, Alas, Good gracious, Oh my, Heavens, Oh what a pity, Botheration,
    Mercy me
taste: warm, sweet, fresh, crunchy, sticky, crumbly, golden, spicy, buttery, soft, delicious, sugary, tasty, juicy,
    toasted, steaming, creamy, mouth-watering, light, heavenly, moist, dainty, crisp, tempting
flavour: apple, plum, pear, cherry, honey, ginger, lemon, pumpkin, vanilla, walnut, raisin, cinnamon, peach, almond,
    blueberry, raspberry, carrot, coconut, apricot, chocolate, rhubarb, hazelnut, banana, blackberry, orange, toffee,
    gooseberry, treacle, oat, poppy-seed, fig, nutmeg
treats: buns, muffins, biscuits, pancakes, dumplings, scones, cookies, tarts, rolls, waffles, turnovers, crumpets,
    cupcakes, pies, fritters, pastries
ripe: ripe, juicy, plump, shiny, fragrant, rosy, mellow, luscious, glossy, big, beautiful, velvety
drink: apple juice, mint tea, warm milk, hot cocoa, cold lemonade, ginger beer, elderflower water, honey milk,
    nettle tea, orange juice, spring water, rosehip tea
cuddly: soft, woolly, patchwork, cosy, padded, feathery, knitted, velvety, downy, checked, thick, flowery
blanket: blanket, quilt, eiderdown, bedspread, duvet, shawl
big: big, gentle, long, grateful, cheerful, tight, tender, clumsy, bouncy, wonderful, loving, hearty
best: kindest, cleverest, sweetest, bravest, wisest, dearest, truest, finest, gentlest, loveliest, noblest, nicest
world: world, village, valley, country, county, kingdom, land, neighbourhood
soon: Soon, Before long, In a little while, By and by, After a while, At last, Presently, A little later
cold: a cold, a cough, a fever, a sore throat, a tummy ache, a sprained ankle, a toothache, the chickenpox
game: marbles, hide-and-seek, leapfrog, skittles, tag, rounders, badminton, croquet
spooky: creaking, rustling, scratching, moaning, tapping, whistling, rattling, squeaking, thumping, dripping, groaning,
    sighing
trembled: trembled, shivered, shook, quivered, wobbled, swallowed
breath: deep, long, shaky, slow, brave, enormous, careful, quick
patter: pattered, drummed, splashed, poured, tumbled, lashed, streamed, hammered
thunder: boomed, rumbled, growled, crashed, roared, rolled, echoed, grumbled
gleamed: sparkled, glittered, shimmered, danced, gleamed, twinkled, glowed, shone
material: wool, paper, felt, velvet, string, straw, silk, cotton, clay, cardboard, linen, beads, lace, leather, shells,
    feathers
snipped: snipped, glued, stitched, folded, painted, threaded, tied, wove
days: two days, three days, four days, five days, six days, a week, two weeks, a fortnight
tired: tired, dusty, sore, dizzy, hot, sticky, breathless, grumpy
game_verb: played, danced, raced, skipped, frolicked, tumbled, twirled, romped
tune: tune, song, lullaby, melody, march, jig
sweet: sweet, soft, silly, jolly, slow, little, funny, tender
decor: balloons, streamers, lanterns, garlands, flags, ribbons, candles, banners
path: path, lane, track, trail, stream, hedgerow, footpath, brook
turn: bend, fork, stile, milestone, crossroads, footbridge, clearing, puddle
shade: pale, deep, soft, bright, clear, stormy, rosy, hazy, pearly, glowing
sky_col: blue, grey, pink, golden, silver, lilac
friend: friend, pal, playmate, companion, chum, schoolmate
dear: dear, good, old, loyal, cheerful, funny, true, faithful, trusty, clever, favourite, lovely
roomy: roomy, wicker, wooden, big, sturdy, round, heavy, little
tiny_voice: tiny, faint, squeaky, small, shaky, thin, muffled, frightened
seedy: tiny, round, striped, speckled, shiny, brown, hard, pointed
earth: soft, dark, warm, damp, rich, crumbly, black, moist
finest: finest, loveliest, best, most wonderful, most beautiful, prettiest, nicest, most charming
paper: shiny, crinkly, soft, flowery, checked, sparkly, dotted, yellow, silky, bright, silver, starry
cross: cross, angry, grumpy, furious, stubborn, sulky, loud, rude
noise: loud, terrible, mighty, tremendous, dreadful, awful, noisy, frightful
playing: dancing, jumping, running, skipping, hopping, racing, twirling, juggling
bouncing: rubber, leather, bouncy, woollen, round, heavy, shiny, big
wet: wet, cold, soaked, shivery, drenched, muddy, dripping, chilly
cart: rattling, heavy, loaded, squeaky, big, wobbly, painted, long
cold_wind: cold, wild, howling, mighty, icy, strong, fierce, sharp
leaf: tiny, tender, curly, delicate, shiny, pointed, little, heart-shaped
crowd: mayor, judge, teacher, postman, baker, farmer
toyish: little, new, old, shiny, lovely, tiny, pretty, big, smooth, handsome, fine, dainty
merry: merry, glorious, wonderful, splendid, great, jolly, magical, marvellous
mark: star, heart, moon, flower, crown, anchor, bee, leaf
idea: clever, bright, bold, brilliant, simple, sudden, splendid, good
"""

TYPED = """
boxes: basket, lunch box, rucksack, hamper, pail, satchel, biscuit tin, bag
weekday: Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
girls: Lily, Emma, Rosie, Poppy, Daisy, Hazel, Willow, Clara, Nora, Ella, Mia, Ruby, Molly, Tilly, Ivy, Alice, Maya,
    Zoe, Anna, Lucy, Sophie, Grace, Nina, Lola, Clover, Pearl
boys: Tom, Max, Ben, Sam, Leo, Finn, Oscar, Jack, Noah, Theo, Milo, Henry, Oliver, Toby, Jasper, Felix, Hugo, Otto,
    Rusty, Pip, Barney, George, Arlo, Eddie, Rory, Charlie
girl: girl
boy: boy
animals: rabbit, bear, mouse, fox, owl, hedgehog, squirrel, badger, otter, mole, duckling, kitten, puppy, piglet, lamb,
    beaver
women: mother, grandmother, aunt, godmother
men: father, grandfather, uncle, godfather
houses: cottage, house, cabin, farmhouse, bungalow, lodge, hut, caravan, treehouse, windmill
lands: river, forest, lake, hills, sea, meadow, orchard, brook, valley, cliffs, mountains, woods, harbour, canal,
    farm, moor
colours: red, blue, green, yellow, purple, orange, pink, white, silver, golden, brown, grey, crimson, turquoise,
    striped, spotted
toys: ball, kite, drum, doll, scarf, hat, bell, basket, book, ribbon, whistle, trumpet, mitten, lantern, boat, cap, cup,
    flute, marble, feather, purse, puppet, shovel, necklace, bracelet, backpack, pencil, paintbrush, slipper, glove,
    key, horn, wagon, umbrella, button, kerchief, locket, compass, balloon, brooch
crafts: blanket, bookmark, cushion, picture frame, pincushion, apron, teddy bear, jewel box, waistcoat, birdhouse,
    lampshade, photo album
fruits: cherries, apples, plums, pears, peaches, strawberries, raspberries, blackberries, apricots, grapes, figs, oranges,
    melons, bananas
plants: sunflower, pumpkin, melon, bean, tomato, marigold, pansy, foxglove, cucumber, turnip, radish, cabbage
fragile: vase, bowl, teapot, plate, jug, mirror, lamp, mug, clock, saucer, pitcher, milk jug
tools: rope, ladder, plank, rake, broom, long stick, fishing rod, walking stick
places: old mill, duck pond, village green, apple orchard, rose garden, market square, stone bridge, sandy beach,
    hay barn, pine forest, river bank, maple grove, sunflower field, playground, blueberry field, castle ruins, school yard,
    pumpkin patch, herb garden, picnic meadow, bluebell wood, strawberry field, lily pond, bandstand
shelters: barn, cave, tool shed, greenhouse, stable, tent, lighthouse, town hall
dark_places: tunnel, cavern, coal shed, ruined tower, hayloft, woodshed, cellar, mine
traps: mud, brambles, hollow log, ditch, fishing net, drainpipe, thorn bush, swamp
glad: happy, proud, glad, joyful, cheerful, delighted, thankful, merry, content, overjoyed, thrilled, lucky, blissful,
    peaceful, hopeful, grateful
sad: sad, worried, upset, lonely, gloomy, miserable, unhappy, sorry, glum, downhearted, troubled, heavy-hearted
deeds: bake a honey cake/baked a honey cake | paint a picture/painted a picture | sing a lullaby/sang a lullaby |
    write a poem/wrote a poem | knit a scarf/knitted a scarf | build a kite/built a kite |
    cook some soup/cooked some soup | carve a whistle/carved a whistle | dance a jig/danced a jig |
    tell a story/told a story | gather some apples/gathered some apples | draw a map/drew a map |
    make a puppet/made a puppet
skills: swim/swimming | whistle/whistling | skate/skating | juggle/juggling | dance/dancing | knit/knitting |
    ski/skiing | sing/singing | sew/sewing | bake/baking | climb/climbing | read/reading | write/writing |
    paint/painting
m_lost: good friends help you look | nothing is lost while friends are near | two pairs of eyes are better than one
m_promise: a promise is a promise | true friends keep their word | a kept promise warms two hearts
m_share: sharing makes everything taste sweeter | there is always enough for two | a shared picnic is the best of all
m_brave: being brave means trying anyway | the dark is only a room without light |
    even small people can have big courage
m_stuck: one good turn deserves another | nobody is too small to help | a helping hand is worth more than gold
m_plant: good things come to those who wait | patience makes the garden grow | small seeds hold big surprises
m_gift: the best gifts are made with love | a gift from the heart is never small | love is the finest wrapping
m_quarrel: a friend is worth more than any toy | it is never too late to say sorry | taking turns is twice the fun
m_skill: practice makes progress | every expert was once a beginner | falling down is part of learning
m_truth: the truth makes a heavy heart light | honest words mend more than glue | it is always best to be honest
m_storm: every storm passes in the end | a warm welcome is better than sunshine | rain makes room for rainbows
m_new: every stranger may be a friend | a small hello can start a big friendship | new neighbours bring new joys
m_way: it is wise to ask the way | home is the best place of all | kind strangers light the way
m_race: kindness matters more than winning | friends are better than prizes | the best races end side by side
m_party: friends never really forget | the best surprises are made by friends | love can hide behind a closed door
m_finder: giving back feels better than keeping | honesty makes new friends | finders should look for owners
"""

GRAMMAR = """
story:
- [once] [likes] / One [weather] [wd=weekday] [part], [plot]

once:
- Once upon a time, in [home], there lived [who].
- Long ago, [who] lived in [home].
- There once was [who] who lived in [home].
- In [home], there lived [who].
- This is the story of [who] who lived in [home].
- Not so far from here, in [home], lived [who].

home:
- [cosy.a] [house=houses] [near=beside] the [wild] [land=lands]

who:
- [x=trait.a] and [trait!x] [hk=girl] named [h=girls]
- [x=trait.a] and [trait!x] [hk=boy] named [h=boys]
- [x=trait.a] and [trait!x] [hk=animals] named [h=names]

likes:
- {He} loved [hobby], [outdoor] and [treat].
- Every [weekday], {he} went [outdoor] with {his} [relative].
- {His} favourite things were [hobby] and [treat].
- {h} had [eyes] eyes, [smile.a] smile and a pocket full of [toyish] [pocketful].
- Everyone in the [world] knew {his} [smile] smile and {his} [colours] [wear].
- Nobody in the [world] was better at [hobby] or [outdoor].

creature:
- [x=fluffy.a] and [fluffy!x] [critter]
- [fluffy.a] little [critter]

spot:
- the [big_adj] [spot_noun]

bunch:
- [petal] [flowers]

treat:
- [taste] [flavour] [treats]

cuddle:
- [x=cuddly.a] and [cuddly!x] [blanket]

scene:
- [fluffy.cap] [birds] were [sing] in the [tree] trees, and the air smelled of [x=smell] and [smell!x].
- [fluffy.A] [bug] landed on some [bunch], and [fluffy] [birds] were [sing] [happily].
- The [shade] [sky_col] sky was full of clouds that looked like [y=fluffy] [x=shape] and [fluffy!y] [shape!x].
- Sunlight [gleamed] on the [bunch], and the [weather] air smelled of [smell].
- Behind [spot], [creature] was watching [number] [fluffy] [birds].
- Near [spot], [creature] was dozing under [tree.a] tree.

meal:
- They ate [treat] and [ripe] [fruits], and they drank [drink].
- There were [treat], [ripe] [fruits] and [drink] for everyone.
- Soon the table was full of [treat], [ripe] [fruits] and [drink].

helper:
- [soon], [elder.a] [gk=animals] named [g=names!h] came [hurrying] along the [wild] [path].
- Who should come [hurrying] down the [path] but [elder.a] [gk=animals] named [g=names!h]!
- Just then, [elder.a] [gk=animals] named [g=names!h] came [hurrying] past [spot].

thanks:
- "Thank you, {g}! You are the [best] {gk} in the [world]," [said] {h} [happily].
- {h} gave {g} a [big] hug. "Thank you, {g}," {he} [said] [happily].
- "[hooray], you did it, {g}!" [said] {h} [happily] and gave the {gk} a [big] hug.

end:
- [learned] [m_*].
- [night]

day_end:
- [learned] [m_*].
- [night]
- It was the [finest] {wd} of the year, and {h} felt [x=glad_end] and [glad_end!x].

learned:
- {h} had learned that
- And so {h} found out that
- From that day on, {h} always remembered that
- Now {h} knew for certain that
- {h} smiled, because {he} knew that

night:
- That night, in the {house} {near} the {land}, {h} slept under [cuddle] and dreamed of [y=fluffy] [x=shape] and
    [fluffy!y] [shape!x].
- When the moon rose, {h} fell asleep in the {house} {near} the {land}, [glad_end] and dreaming of [fluffy] [shape].
- At bedtime, {h} curled up under [cuddle] in the {house} {near} the {land}, feeling [x=glad_end] and [glad_end!x].

plot:
- [lost_and_found]
- [promise_kept]
- [sharing]
- [afraid_then_brave]
- [helping_someone_stuck]
- [planting_and_waiting]
- [making_a_gift]
- [quarrel_and_making_up]
- [learning_a_skill]
- [telling_the_truth]
- [storm_and_shelter]
- [new_neighbour]
- [getting_lost_and_finding_home]
- [running_a_race]
- [a_surprise_party]
- [finding_the_owner]

lost_and_found:
- <lost and found> [lost_start] [scene] [lost_gone] [lost_cry] / [lost_search] [helper] [lost_ask] [lost_found] /
    [thanks] [day_end:lost]
lost_start:
- {h} took {his} [toyish] [col=colours] [toy=toys] to the [wild] [place=places].
- {h} [went] [slowly] to the [wild] [place=places] with {his} [toyish] [col=colours] [toy=toys].
lost_gone:
- {h} followed [fluffy.a] [bug] past [spot], and when {he} came back, the {col} {toy} was gone.
- But when {h} had been [outdoor] for a while, the {col} {toy} was nowhere to be seen.
- {h} [game_verb] [happily] among the [bunch], and the {col} {toy} slipped away without a sound.
lost_cry:
- "[ohno], I have lost my {toy}!" {he} [wept] [sadly].
- {h} felt [x=sad] and [sad!x]. "Where is my {toy}?" {he} [wept] [sadly].
- With [sad.a] face, {he} sat down beside [spot] and [wept] [sadly].
lost_search:
- {h} [looked] behind [spot] and around [spot], but found only [number] [toyish] [pocketful].
- First {he} [looked] [slowly] behind [spot], and then {he} [looked] among the [bunch].
lost_ask:
- "What is the matter, little {hk}?" asked {g} [kindly], and together they searched the {place}.
- "You look so [sad], little {hk}," said {g} [kindly]. "Let us search the {place} together."
lost_found:
- There, among the [bunch], lay the {col} {toy}!
- "[hooray]!" [said] {g} [happily]. Behind [spot] lay the {col} {toy}!
- Something {col} was peeping out from behind [spot]. It was the {toy}!

promise_kept:
- <promise kept> [prom_start] [prom_word] / [prom_way] [prom_tempt] [prom_hold] / [prom_keep] [prom_joy]
    [end:promise]
prom_start:
- {h} heard that {his} [dear] [friend] [f=names!h] was in bed with [cold].
- {h} went to see {his} [dear] [friend] [f=names!h], who had to stay at home with [cold].
prom_word:
- "Poor {f}," said {h} [kindly]. "I promise to [deed=deeds] for you before [weekday]."
- "I will [deed=deeds] for you, {f}. I promise," {he} said [kindly].
- "Do not be [sad], {f}," said {h} [kindly]. "I promise to [deed=deeds] for you."
prom_way:
- {h} [went] home along the [wild] [path], past [spot] and [creature].
- On the way home, {he} stopped at the [wild] [places] to watch [creature].
prom_tempt:
- There {he} met [g=names!h!f], who had [treat]. "Come and play [game] with me!" [said] {g} [happily].
- Then [g=names!h!f] came [hurrying] by. "Let us go [outdoor] together!" [said] {g} [happily].
prom_hold:
- It sounded like [merry] fun, but {h} [replied] [kindly], "Not today, {g}. I made a promise to {f}."
- "Another day, {g}," [replied] {h} [kindly]. "First I must {deed} for {f}."
- For a moment {h} felt [x=sad] and [sad!x], but then {he} [replied] [kindly], "I gave {f} my word."
prom_keep:
- So {h} [went] home [slowly], and that [weather] evening {he} {deed.did} for {f}, just as {he} had promised.
- Then {h} [went] [slowly] back to {f} and {deed.did} for {f}, just as {he} had promised.
prom_joy:
- "[hooray], you kept your word!" [said] {f} [happily]. "You are the [best] [friend] in the [world], {h}."
- {f} felt [x=glad] and [glad!x]. "You did not forget, {h}!" {f.he} [said] [happily].
- At once {f} felt better. They drank [drink] and ate [treat] with [ripe] [fruits].

sharing:
- <sharing> [share_start] [scene] [share_meet] / [share_ask] [share_give] / [share_back] [meal] [day_end:share]
share_start:
- {h} filled {his} [colours] [box=boxes] with [ripe] [fruit=fruits] and [went] [slowly] to the [wild] [places].
- {h} packed [number] [ripe] [fruit=fruits] into a [roomy] [box=boxes] and [went] [slowly] to the [wild] [places].
share_meet:
- There {h} met [elder.a] [gk=animals] named [g=names!h], who had nothing to eat.
- By [spot] sat [elder.a] [gk=animals] named [g=names!h], looking [x=sad] and [sad!x].
share_ask:
- "Those {fruit} look [ripe]," [wept] {g} [sadly]. "I lost my lunch behind [spot]."
- "What [ripe] {fruit}!" [wept] {g} [sadly]. "I have had no [treats] and no [drink] since [weekday]."
share_give:
- Then {he} smiled [kindly] and gave half of the {fruit} to {g} with [smile.a] smile.
- But {g} looked so [sad] that {he} held out the {box} and said [kindly], "Please help yourself, {g}!"
- "Let us share the {fruit}, {g}," {he} said [kindly]. "Half for you and half for me."
share_back:
- "Thank you, {h}!" [said] {g} [happily]. "Now come home with me to my [cosy] [houses]!"
- {g} felt [x=glad] and [glad!x] and [said] [happily], "Now I will share my supper with you, {h}!"

afraid_then_brave:
- <afraid then brave> [brave_start] [scene] [brave_fear] / [brave_cry] [brave_count] [brave_in] / [brave_find]
    [brave_after] [day_end:brave]
brave_start:
- {h} played [game] by the [big_adj] [dark=dark_places] with {his} [dear] [friend] [f=names!h].
- {h} went [outdoor] near the [big_adj] [dark=dark_places] with {his} [dear] [friend] [f=names!h].
brave_fear:
- {h} was afraid of the {dark}, because it was full of [x=spooky] and [spooky!x].
- The {dark} was as black as night, and something in there was always [x=spooky] and [spooky!x].
brave_cry:
- Suddenly a [tiny_voice] voice [wept] [sadly] inside the {dark}, "Help! It is so dark in here!"
- All at once they heard a [tiny_voice] cry. "Somebody is in the {dark}!" [wept] {f} [sadly].
brave_count:
- {h} [trembled] and felt [sad], but {he} took [breath.a] breath and counted to [number].
- "I am afraid," {h} [replied] [sadly], "but somebody needs me." {He} took [number] [breath] breaths.
- "Wait for me, {f}," said {h} [kindly]. {He} [trembled] and took [number] [breath] breaths.
brave_in:
- Then {he} lit [col=colours.a] lantern and stepped [slowly] into the {dark}.
- With [col=colours.a] lantern in front of {him}, {he} crept [slowly] into the {dark}.
brave_find:
- There, behind [spot], sat [x=fluffy.a] and [fluffy!x] baby [gk=animals] with [eyes] eyes.
- The light of the {col} lantern fell on [x=fluffy.a] and [fluffy!x] baby [gk=animals] behind [spot].
brave_after:
- {h} carried the {gk} out [slowly]. "[hooray]!" [said] {f} [happily], and nobody was afraid of the {dark} any more.
- "[hooray], you saved the little {gk}!" [said] {f} [happily]. "You are the [best] [friend] in the [world], {h}."
- The little {gk} felt [x=glad] and [glad!x], and the {dark} did not seem so dark to {h} any more.

helping_someone_stuck:
- <helping someone stuck> [stuck_start] [scene] [stuck_hear] / [stuck_see] [stuck_tool] [stuck_free] /
    [stuck_joy] [stuck_back] [end:stuck]
stuck_start:
- {h} was all alone, [outdoor] near the [wild] [place=places].
- {h} set out all alone for the [wild] [place=places], humming a [sweet] [tune].
stuck_hear:
- Suddenly a [tiny_voice] voice [wept] [sadly], "[ohno], please help me!"
- Then somebody behind [spot] [wept] [sadly], "Help! Is anybody there?"
stuck_see:
- It was [elder.a] [gk=animals] named [g=names!h], who was stuck in the [trap=traps].
- There sat [elder.a] [gk=animals] named [g=names!h], [x=tired], [tired!x] and stuck in the [trap=traps].
stuck_tool:
- Then {h} had [idea.a] idea and fetched a [roomy] [tool=tools] from behind [spot].
- So {h} [went] [slowly] past [spot] and came back with a [roomy] [tool=tools].
stuck_free:
- With the {tool}, {h} pulled [slowly], and out of the {trap} came {g}, [x=wet] and [wet!x]!
- {g} held on to the {tool}, {h} pulled [slowly], and pop! Out of the {trap} came {g}, [x=wet] and [wet!x]!
stuck_joy:
- "Thank you, {h}! You are the [best] {hk} in the [world]," [said] {g} [happily].
- {g} gave {h} a [big] hug and [said] [happily], "I will never forget this, {h}!"
stuck_back:
- On [weekday], {h} lost the way near the {place}, and it was {g} who led {him} [slowly] past [spot] to the {house}.
- When {h} lost [toyish.a] [colours] [toys] on [weekday], it was {g} who found it behind [spot].
- The next day, {g} came to the {house} with [treat] and [ripe] [fruits] to say thank you.

planting_and_waiting:
- <planting and waiting> [plant_start] [plant_dig] [scene] / [plant_wait] [plant_advice] / [plant_grow]
    [plant_joy] [end:plant]
plant_start:
- {his} [a=adults] gave {h} a [x=seedy] and [seedy!x] [plant=plants] seed.
- {h} discovered a [x=seedy] and [seedy!x] [plant=plants] seed in the [colours] basket of {his} [a=adults].
plant_dig:
- {He} dug a hole beside the [corner=spot_noun] and covered the seed [slowly] with [x=earth] and [earth!x] earth.
- Next to the [corner=spot_noun], {he} planted it [slowly] in the [x=earth] and [earth!x] earth.
plant_wait:
- On [weekday], nothing had grown. {h} waited for [days], [hobby] to pass the time.
- {h} watered it [slowly] every day, but beside the {corner} there was only [x=earth] and [earth!x] earth.
plant_advice:
- "Be patient, {h}," said {his} {a} [kindly]. "{plant.A} needs [earth] earth, [sweet] rain and time."
- "Sing to it, {h}," said {his} {a} [kindly], so every day {he} sang a [sweet] [tune] to the {plant} seed.
plant_grow:
- Then, after [days] of [weather] weather, a [x=leaf] and [leaf!x] shoot peeped out beside the {corner}.
- At last, one [weather] [part], a [x=leaf] and [leaf!x] shoot came up beside the {corner}, and it grew and grew.
plant_joy:
- It became the [finest] {plant} in the [world]. "[hooray]!" [said] {h} [happily].
- "[hooray], my {plant}!" [said] {h} [happily], and {his} {a} [game_verb] [happily] around the {corner}.
- {h} showed the [finest] {plant} in the [world] to {his} {a}, and they [game_verb] [happily] around it.

making_a_gift:
- <making a gift> [gift_start] [gift_poor] [gift_think] / [gift_make] [gift_wrap] / [gift_give] [gift_joy] [meal]
    [end:gift]
gift_start:
- {h} remembered that the birthday of {his} [dear] [friend] [f=names!h] was on [weekday].
- {h} got a [paper] letter. {His} [dear] [friend] [f=names!h] was having a birthday party on [weekday].
gift_poor:
- {He} wanted to buy a present, but there were only [number] [toyish] [pocketful] in {his} [colours] purse.
- But {he} had no money for a present, and {he} felt [x=sad] and [sad!x].
gift_think:
- Then {he} had [idea.a] idea. "I will make [toyish.a] [col=colours] [craft=crafts] for {f}!" {he} [said] [happily].
- {His} [kin] said [kindly], "Why not make [toyish.a] [col=colours] [craft=crafts] yourself, {h}?"
gift_make:
- {h} took some [x=material] and some [material!x], and {he} [snipped] [slowly] until bedtime.
- For [days], {h} [snipped] [x=material] and [material!x] [slowly] while the [birds] were [sing].
gift_wrap:
- At last the {col} {craft} was done, and {he} wrapped it [slowly] in [paper] paper with [colours.a] bow.
- When the {craft} was ready, {he} put [number] [bunch] on top and tied it with [colours.a] bow.
gift_give:
- {h} [went] [slowly] to the party, and {f} untied the bow and found the {col} {craft}.
- {h} [trembled] when {f} opened the parcel [slowly] and saw the {col} {craft}.
gift_joy:
- "[hooray]! This {craft} is the [finest] present of all," [said] {f} [happily]. "Thank you, {h}!"
- {f} felt [x=glad] and [glad!x] and gave {h} a [big] hug. "Thank you, {h}!" {f.he} [said] [happily].

quarrel_and_making_up:
- <quarrel and making up> [quar_start] [scene] [quar_pull] [quar_angry] / [quar_alone] [quar_miss] [quar_idea] /
    [quar_sorry] [quar_answer] [quar_play] [end:quarrel]
quar_start:
- {h} played [game] with {his} [dear] [friend] [f=names!h] at the [wild] [place=places].
- {h} met {his} [dear] [friend] [f=names!h] at the [wild] [place=places] to play [game].
quar_pull:
- Behind [spot] they found [toyish.a] [col=colours] [toy=toys]. "It is mine!" cried {h}. "No, mine!" shouted {f}.
- Then {f} brought out [toyish.a] [col=colours] [toy=toys], and both of them shouted, "Me first!"
quar_angry:
- They pulled and pulled until the {toy} fell behind [spot] and {f} fell into the [bunch].
- {h} stamped {his} foot, {f} stamped too, and soon both of them were [x=cross] and [cross!x].
quar_alone:
- {h} walked home past [spot] and tried [hobby], but it was no fun alone.
- Back at home, {h} tried [hobby], but {he} felt [x=sad] and [sad!x].
quar_miss:
- {He} remembered how {f} had once shared [treat] with {him} behind [spot].
- Even the [treat] and [ripe] [fruits] did not taste good without {f}.
quar_idea:
- So {he} picked some [bunch] and [went] [slowly] back to the {place}.
- {His} [kin] said [kindly], "Go and say sorry." So {he} took [number] [ripe] [fruits] to the {place}.
quar_sorry:
- "I am sorry, {f}," said {h} [kindly]. "I brought you [treat], and you may have the {toy} first."
- "I am sorry I was so [cross], {f}," said {h} [kindly]. "Let us take turns with the {toy}."
quar_answer:
- "I am sorry too, {h}," [replied] {f} [kindly] with [smile.a] smile.
- {f} felt [x=glad] and [glad!x]. "I missed you, {h}," {f.he} [replied] [kindly].
quar_play:
- So they shared the {col} {toy} and [game_verb] [happily] among the [bunch] until supper.
- They took turns with the {col} {toy} and [game_verb] [happily] around [spot].

learning_a_skill:
- <learning a skill> [skill_start] [skill_see] [scene] / [skill_try] [skill_fail] [skill_advice] / [skill_days]
    [skill_can] [skill_joy] [end:skill]
skill_start:
- {h} wanted to learn to [skill=skills].
- {h} made up {his} mind to learn to [skill=skills].
skill_see:
- {He} had seen {his} [dear] [friend] [f=names!h] {skill.ing} near the [wild] [places], and it looked like
    [merry] fun.
- {His} [dear] [friend] [f=names!h] always did it so [happily] that it looked like [merry] fun.
skill_try:
- {h} tried [slowly] on [weekday], but it was much too hard, and soon {he} was [x=tired] and [tired!x].
- The first time, {h} [trembled], got it all wrong and bumped into [spot].
skill_fail:
- "[ohno], I will never learn to {skill}," {he} [wept] [sadly].
- After [number] tries {he} felt [x=sad] and [sad!x]. "I cannot {skill}," {he} [wept] [sadly].
skill_advice:
- "I could not {skill} at first either," said {f} [kindly]. "Take [breath.a] breath and try again, {h}."
- "Nobody can {skill} in one day, {h}," said {f} [kindly], and they ate some [treat].
skill_days:
- So {h} practised [slowly] for [days], in [weather] weather and in rain, while the [birds] were [sing].
- Every day {h} practised [slowly] near [spot], and [creature] was watching {him}.
skill_can:
- Then, one [weather] [weekday], with [smile.a] smile, {h} could {skill} all by {himself}!
- And at last, one [weather] [weekday], {h} could {skill} as well as {f}!
skill_joy:
- "[hooray], well done, {h}!" [said] {f} [happily], and they ate [treat] with [ripe] [fruits].
- {f} clapped [happily] and gave {h} [toyish.a] [colours] [toys] and some [bunch] as a prize.
- {h} felt [x=glad_end] and [glad_end!x]. "Thank you for your help, {f}," {he} [said] [happily].

telling_the_truth:
- <telling the truth> [truth_start] [truth_break] [truth_hide] / [truth_guilt] [truth_ask] / [truth_tell]
    [truth_forgive] [truth_mend] [end:truth]
truth_start:
- {h} stayed indoors, [playing] [happily] with [bouncing.a] [colours] ball.
- {h} stayed in the kitchen, [playing] [happily] around the [roomy] table.
truth_break:
- Crash! The [col=colours] [pot=fragile] of {his} [a=adults] fell from the shelf and broke into [number] pieces.
- With [noise.a] crash, the [col=colours] [pot=fragile] of {his} [a=adults] broke into [number] pieces.
truth_hide:
- "[ohno]!" {he} [wept] [sadly], and {he} ran out and hid the pieces [slowly] behind [spot].
- {h} [trembled] and crept [slowly] outside to hide the pieces behind [spot].
truth_guilt:
- All day {he} felt [x=sad] and [sad!x], and even the [treat] tasted of nothing.
- {He} tried [hobby] and [outdoor], but {he} could only think of the {col} {pot}.
truth_ask:
- In the evening {his} {a} looked around. "Where is my {col} {pot}?" {a.he} asked [kindly].
- Then {his} {a} came in with some [treat] and asked [kindly], "Where is my {col} {pot}?"
truth_tell:
- {h} took [breath.a] breath. "I broke it," {he} [replied] [sadly], "and I feel [x=sad] and [sad!x]."
- "It was me," {h} [wept] [sadly]. "I broke your {pot} and hid the pieces behind [spot]."
truth_forgive:
- {His} {a} gave {him} a [big] hug. "Thank you for telling the truth, {h}," {a.he} said [kindly].
- "{pot.A} can be mended," said {his} {a} [kindly], "and I am very glad that you were honest, {h}."
truth_mend:
- They glued the {col} {pot} together [slowly] and filled it with [number] [bunch].
- That evening they mended the {col} {pot} [slowly] and painted [y=fluffy] [x=shape] and [fluffy!y] [shape!x] on it.
- Together they mended the {col} {pot}, and {h} felt [x=glad_end] and [glad_end!x].

storm_and_shelter:
- <storm and shelter> [storm_start] [scene] [storm_sky] [storm_rain] / [storm_help] [storm_in] / [storm_wait]
    [storm_over] [storm_bye] [day_end:storm]
storm_start:
- {h} invited {his} [dear] [friend] [f=names!h] to go [outdoor] at the [wild] [place=places].
- {his} [dear] [friend] [f=names!h] took {h} [outdoor] at the [wild] [place=places].
storm_sky:
- But soon the sky turned dark, and the thunder [thunder] over the {land}.
- Suddenly [x=cold_wind.a] and [cold_wind!x] wind blew, and the thunder [thunder] over the {land}.
storm_rain:
- Rain [patter] on the [bunch], and {f} [trembled] and [wept] [sadly].
- The rain [patter] down until {h} and {f} were [x=wet] and [wet!x].
storm_help:
- By the [wild] [shelter=shelters] stood [elder.a] [gk=animals] named [g=names!h!f] with [colours.a] umbrella.
- In the door of the [wild] [shelter=shelters] they saw [elder.a] [gk=animals] named [g=names!h!f] with
    [colours.a] lantern.
storm_in:
- "Come in, come in!" said {g} [kindly] and gave each of them [cuddle].
- {g} let them into the {shelter} and gave them [drink] and [cuddle].
storm_wait:
- While the rain [patter] on the roof, they ate [treat] and told tales about [y=fluffy] [x=shape] and [fluffy!y]
    [shape!x].
- The storm [thunder] outside, but inside they ate [treat] and sang a [sweet] [tune] about [fluffy] [shape].
storm_over:
- [soon], the sun came out, and a rainbow [gleamed] over the {place}.
- Then the rain stopped, the [birds] were [sing] again, and the sky was [shade] [sky_col].
storm_bye:
- "Thank you for letting us into the {shelter}, {g}!" [said] {h} [happily], and the friends [went] home.
- {h} [said] [happily], "Thank you, {g}! You are the [best] {gk} in the [world]," and the friends [went] home.

new_neighbour:
- <new neighbour> [new_start] [new_see] [scene] / [new_bring] [new_meet] / [new_play] [new_go] [meal] [end:new]
new_start:
- {h} saw a [x=cart] and [cart!x] cart in front of the empty house with the [col=colours] door.
- {h} heard [noise.a] noise from the empty house with the [col=colours] door.
new_see:
- [elder.A] [fk=animals] was carrying in [number] [roomy] boxes, [cuddle] and [toyish.a] [col2=colours!col]
    [toy=toys].
- Out of the window looked [elder.a] [fk=animals] with [smile.a] smile and [toyish.a] [col2=colours!col] [toy=toys].
new_bring:
- So {h} took some [treat], [went] [slowly] to the {col} door and knocked [number] times.
- Then {h} picked some [bunch], took [breath.a] breath and knocked on the {col} door.
new_meet:
- "I am {h}," {he} said [kindly]. "I am [f=names!h]," [replied] the {fk} [kindly]. "Please come in!"
- "Welcome! My name is {h}," {he} said [kindly]. "Mine is [f=names!h]," [replied] the {fk} [happily].
new_play:
- {f} showed {him} the {col2} {toy}, and {h} told {f} all about [outdoor].
- They played [game] with the {col2} {toy} and talked about [hobby] and [outdoor].
new_go:
- Then {h} took {f} to the [wild] [places], where they [game_verb] [happily] among the [bunch].
- On [weekday] {h} and {f} [went] to the [wild] [places] together to meet [creature].

getting_lost_and_finding_home:
- <getting lost and finding home> [way_start] [scene] [way_lost] [way_cry] / [helper] [way_tell] / [way_walk]
    [way_home] [way_hug] [day_end:way]
way_start:
- {h} followed [fluffy.a] [bug] far beyond the [wild] [places].
- {h} went [outdoor] behind the [wild] [places] and [went] on and on.
way_lost:
- When {h} turned around, there was only [spot], and nothing looked familiar.
- [soon], {h} came to a [turn] and [spot], and the [path] came to an end.
way_cry:
- "[ohno], I cannot find the way home," {he} [wept] [sadly].
- {h} sat down under [tree.a] tree, [x=sad] and [sad!x], and [wept] [sadly].
way_tell:
- "Little {hk}, why do you look so [sad]?" asked {g} [kindly]. "I want to go home to the {house} {near} the
    {land}," {he} [wept].
- "Are you lost, little {hk}?" asked {g} [kindly]. "I live in the {house} {near} the {land}," {he} [wept] [sadly].
way_walk:
- "I know it well," said {g} [kindly]. They [went] [slowly] past [spot] and over the [turn].
- {g} took {him} by the hand, and they [went] [slowly] past [number] [tree] trees and [spot].
- "Just follow me," said {g} [kindly], and they [went] [slowly] while the [birds] were [sing].
way_home:
- At last, behind [spot], {h} saw the {house} {near} the {land}.
- There was the {house} {near} the {land}! "[hooray], I am home!" [said] {h} [happily].
way_hug:
- {His} [a=adults] ran out and gave {him} a [big] hug. "Thank you, {g}," {a.he} said [kindly].
- {His} [a=adults] was so happy that {a.he} gave {g} some [treat] and [ripe] [fruits].
- "Thank you, {g}! You are the [best] {gk} in the [world]," [said] {h} [happily].

running_a_race:
- <running a race> [race_start] [race_ready] [scene] / [race_run] [race_fall] / [race_help] [race_end]
    [race_prize] [day_end:race]
race_start:
- {h} and {his} [dear] [friend] [f=names!h] wanted to race to the [wild] [place=places].
- {h} saw a [paper] poster about a race to the [wild] [place=places], and {his} [dear] [friend] [f=names!h]
    wanted to run too.
race_ready:
- The prize was [toyish.a] [col=colours] [toy=toys]. "Ready, steady, go!" [said] the [elder] [judge=crowd]
    [happily].
- "The winner gets this [toyish] [col=colours] [toy=toys]!" [said] the [elder] [judge=crowd] [happily]. "Ready,
    steady, go!"
race_run:
- {h} ran [swiftly] past [spot], and {f} came [hurrying] close behind.
- They raced [swiftly] along the [wild] [path], over the [turn] and through the [bunch].
race_fall:
- But near [spot], {f} slipped on some [ripe] [fruits] and fell with [noise.a] bump.
- Then {f} tripped over [creature] and [wept] [sadly], "[ohno], my knee!"
race_help:
- {h} turned back [swiftly]. "Lean on me, {f}," {he} said [kindly]. "I do not want to win without you."
- At once {h} stopped and tied [toyish.a] [colours] ribbon around the sore knee. "Let us go on together, {f},"
    {he} said [kindly].
race_end:
- Side by side they [went] [slowly] to the {place}, and everybody cheered [happily].
- Arm in arm they [went] [slowly] to the {place}, where the [birds] were [sing] [happily].
race_prize:
- "You both win!" [said] the {judge} [happily]. So {h} and {f} shared the {col} {toy}.
- {h} and {f} won the {col} {toy} together, and there were [treat] and [ripe] [fruits] for all.
- "You are the [best] [friend] in the [world], {h}," [said] {f}, and they took turns with the {col} {toy}.

a_surprise_party:
- <a surprise party> [party_start] [party_wish] [party_none] / [party_sad] [scene] [party_note] / [party_open]
    [party_gift] [meal] [day_end:party]
party_start:
- {h} woke up [happily] and remembered that it was {his} birthday.
- {h} jumped out of bed and put on {his} [colours] [wear], because it was {his} birthday.
party_wish:
- For [days] {he} had wished for [toyish.a] [col=colours] [toy=toys].
- "I wonder if I will get [toyish.a] [col=colours] [toy=toys]," {he} said [happily].
party_none:
- But nobody said a word about it, and {his} [dear] [friend] [f=names!h] only talked about [hobby] and [outdoor].
- But when {he} met {his} [dear] [friend] [f=names!h], {f.he} just said [kindly], "I must go [outdoor] now."
party_sad:
- {h} felt [x=sad] and [sad!x] and wandered past [spot] to the [wild] [places] all alone.
- "[ohno], everybody has forgotten me," {he} [wept] [sadly] and walked to the [wild] [places].
party_note:
- There {h} found a [paper] note behind [spot]. It said, "Come to the [wild] [shelter=shelters]!"
- Then [fluffy.a] [critter] brought {h} a [paper] letter. It said, "Come to the [wild] [shelter=shelters]!"
party_open:
- {h} [went] [slowly] to the {shelter} and peeped inside. "Surprise!" [said] {f} and [number] friends [happily].
- The {shelter} was full of [colours] [decor], and out jumped {f} and [number] friends. "Surprise!" they [said]
    [happily].
party_gift:
- {f} gave {h} a [paper] parcel with [colours.a] bow, and in it was the {col} {toy} of {his} dreams!
- "This is for you, {h}," said {f} [kindly]. In a [paper] parcel was the {col} {toy}!

finding_the_owner:
- <finding the owner> [own_start] [scene] [own_think] / [own_ask] [own_meet] [own_proof] / [own_give] [own_joy]
    [own_treat] [end:finder]
own_start:
- {h} found [toyish.a] [col=colours] [toy=toys] behind [spot] near the [wild] [place=places].
- {h} saw something under [tree.a] tree by the [wild] [place=places]. It was [toyish.a] [col=colours] [toy=toys]!
own_think:
- {h} wanted to keep the {toy}, but then {he} thought, "Somebody must be [x=sad] and [sad!x] without it."
- {h} took the {toy} home, but that night {he} could not sleep, for {he} felt [x=sad] and [sad!x].
own_ask:
- So {h} asked around [kindly] at the [places!place], but nobody had lost {toy.a}.
- So {h} [went] [slowly] back to the {place} with the {col} {toy}.
own_meet:
- [soon], {h} met [fluffy.a] [fk=animals] named [f=names!h], who [wept] [sadly] behind [spot].
- There, beside the [bunch], sat [fluffy.a] [fk=animals] named [f=names!h], looking [x=sad] and [sad!x].
own_proof:
- "I have lost my {toy}," [wept] {f} [sadly]. "It is {col}, and my [kin] gave it to me."
- "Have you seen {toy.a}?" [wept] {f} [sadly]. "Mine is {col}, with a little [mark] on it."
own_give:
- "Then this must be yours, {f}," said {h} [kindly] and gave back the {col} {toy}.
- With [smile.a] smile, {h} held out the {col} {toy}. "Here it is, {f}," {he} said [kindly].
own_joy:
- "[hooray]! Thank you, {h}!" [said] {f} [happily], and the little {fk} gave {him} a [big] hug.
- {f} felt [x=glad] and [glad!x]. "You are the [best] {hk} in the [world]," {f.he} [said] [happily].
own_treat:
- Then {f} and {h} played [game] together and ate [treat].
- And on [weekday] {f} and {h} went [outdoor] together.
"""

# --- The words ------------------------------------------------------------------------------------------------------

Entry = dict[str, str]
"""One word in all its forms: "" is the plain one, "a" the one with its article, "he" the pronoun ..."""

PRONOUNS = {
    "she": {"he": "she", "him": "her", "his": "her", "himself": "herself"},
    "he": {"he": "he", "him": "him", "his": "his", "himself": "himself"},
    "it": {"he": "it", "him": "it", "his": "its", "himself": "itself"},
    "they": {"he": "they", "him": "them", "his": "their", "himself": "themselves"},
}
GENDERS = {"girls": "she", "women": "she", "boys": "he", "men": "he"}
UNIONS = {"names": ("girls", "boys"), "adults": ("women", "men"), "glad_end": ("glad",)}
SECOND_FORM = {"deeds": "did", "skills": "ing"}

# Which table belongs to which group (any word of the group is recognised where one of them must stand) and
# the kind of violation it is when the wrong one stands there.
GROUPS = {
    **dict.fromkeys(("girls", "boys", "names"), ("names", "names")),
    **dict.fromkeys(("animals", "girl", "boy"), ("kinds", "kinds")),
    **dict.fromkeys(("women", "men", "adults"), ("adults", "kinds")),
    **dict.fromkeys(("toys", "crafts", "fruits", "plants", "fragile", "tools", "boxes"), ("objects", "objects")),
    **dict.fromkeys(("places", "shelters", "dark_places", "traps"), ("places", "places")),
    **dict.fromkeys(("houses", "lands", "beside"), ("homes", "places")),
    **dict.fromkeys(("glad", "sad"), ("feelings", "feelings")),
    "glad_end": ("feelings", "ending"),
    "colours": ("colours", "colours"),
    "weekday": ("days", "days"),
    "spot_noun": ("spots", "places"),
    "crowd": ("crowd", "kinds"),
    "deeds": ("deeds", "ending"),
    "skills": ("skills", "ending"),
}
# Tables that must fit the plot although any word of the group could stand there.
TOLERANT = ("girls", "boys", "glad", "sad", "glad_end")
# Remembered words whose loss is worse than a wrong word of their group.
ROLES = {"g": "helper"}


def _lines(block: str) -> Iterator[str]:
    """The logical lines of a block: an indented line continues the one before."""
    yield from re.sub(r"\n +", " ", block).strip().split("\n")


def _article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def _entry(table: str, surface: str) -> Entry:
    """A word with its forms; a slash separates the plain form from the second one."""
    word, _, second = surface.partition("/")
    article = _article(word)
    entry = {"": word, "a": article, "A": "A" + article[1:], "cap": word[0].upper() + word[1:]}
    if table in SECOND_FORM:
        entry[SECOND_FORM[table]] = second
    for form, pronoun in PRONOUNS.get(GENDERS.get(table, ""), {}).items():
        entry |= {form: pronoun, form.capitalize(): pronoun.capitalize()}
    return entry


def _tables() -> dict[str, tuple[Entry, ...]]:
    tables = {}
    for line in itertools.chain(_lines(PLAIN), _lines(TYPED)):
        name, _, words = line.partition(": ")
        surfaces = re.split(r"\s*\|\s*" if "|" in words or name.startswith("m_") else r",\s*", words)
        tables[name] = tuple(_entry(name, surface) for surface in surfaces)
    for name, members in UNIONS.items():
        tables[name] = tuple(itertools.chain.from_iterable(tables[member] for member in members))
    return tables


TABLES = _tables()
SMALL = 6
"""Words of each table that the small world has: its first ones."""
SMALL_PLOTS = 3
"""Plots of the small world: the first ones."""


def _small(table: str) -> tuple[Entry, ...]:
    if table in UNIONS:
        return tuple(itertools.chain.from_iterable(_small(member) for member in UNIONS[table]))
    return TABLES[table][:SMALL]


def _group(table: str) -> tuple[str, str]:
    """(group, violation kind) of a table; a plain table is a group of its own."""
    return ("morals", "ending") if table.startswith("m_") else GROUPS.get(table, (table, "wording"))


@cache
def _surfaces(group: str, form: str) -> dict[str, Entry]:
    """Every surface that is recognised as a word of the group in this form."""
    members = (entry for table in TABLES if _group(table)[0] == group for entry in TABLES[table])
    found = {entry[form]: entry for entry in members if form in entry}
    if form.lower() in PRONOUNS["it"]:
        for pronouns in PRONOUNS.values():
            pronoun = pronouns[form.lower()]
            found.setdefault(pronoun.capitalize() if form[0].isupper() else pronoun, {})
    return found


@cache
def _pattern(surfaces: frozenset[str]) -> re.Pattern[str]:
    """Matches the longest of the surfaces that ends where a word ends."""
    longest_first = sorted(surfaces, key=lambda surface: (-len(surface), surface))
    return re.compile(f"(?:{'|'.join(map(re.escape, longest_first))})(?![A-Za-z])")


# --- Three ways through the grammar ---------------------------------------------------------------------------------


KINDS = (
    "grammar",  # no story of this world, from this position on
    "names",
    "pronouns",
    "kinds",  # girl, boy, rabbit, mother ...
    "helper",  # not the one who helped
    "objects",
    "colours",
    "places",
    "days",
    "feelings",
    "ending",  # the end does not follow: the promise, the skill, the moral, the last feeling
    "wording",  # the same word twice where two different ones must stand
)
"""The kinds of violation."""


@dataclass(frozen=True)
class Violation:
    """One contradiction: its kind (see `KINDS`), the character position where it stands and what is wrong there."""

    kind: str
    position: int
    message: str


class Teller:
    """Writes a story, of the small world if asked: the text so far, what is remembered, and the bits of the choices made."""

    def __init__(self, draw: random.Random, small: bool = False) -> None:
        self.small = small
        # int(random() * n) is uniform over n alternatives up to a bias below n / 2**53.
        self.random = draw.random
        self.text: list[str] = []
        self.world: dict[str, Entry] = {}
        self.bits = 0.0
        self.plot = ""


class Reader:
    """Follows a text: the position reached, what is remembered, the contradictions met, and the bits so far, in the whole
    world and in the small one (infinite where the small one lacks a word)."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.world: dict[str, Entry] = {}
        self.bits = self.small_bits = 0.0
        self.plot: str | None = None
        self.violations: list[Violation] = []
        # The failure furthest into the text: the alternatives tried in vain before and after it say less.
        self.furthest = -1
        self.wanted = ""
        self.met: tuple[str | None, tuple[Violation, ...]] = (None, ())

    def fail(self, at: int, wanted: str) -> bool:
        """Remember the furthest failure: what was wanted there, the plot and the violations so far. Always False."""
        if at > self.furthest:
            self.furthest, self.wanted = at, wanted
            self.met = (self.plot, tuple(self.violations))
        return False

    def violate(self, kind: str, expected: str, found: str) -> None:
        self.violations.append(Violation(kind, self.at, f'expected {expected}, found "{found}"'))


class Element(Protocol):
    """A piece of the grammar, with one method for each way through it."""

    bits: float

    def tell(self, teller: Teller) -> None:
        """Write one drawn instance."""

    def read(self, reader: Reader) -> bool:
        """Match an instance at the reader's position and go behind it; False when there is none."""

    def heads(self) -> tuple[set[str], bool]:
        """Strings with which every instance begins one way or another, and whether they are whole instances."""


@dataclass
class Text:
    """Text that stands as written."""

    text: str
    bits = 0.0

    def tell(self, teller: Teller) -> None:
        teller.text.append(self.text)

    def read(self, reader: Reader) -> bool:
        if reader.text.startswith(self.text, reader.at):
            reader.at += len(self.text)
            return True
        there = reader.text[reader.at : reader.at + len(self.text)]
        same = next((i for i, (a, b) in enumerate(zip(there, self.text, strict=False)) if a != b), len(there))
        return reader.fail(reader.at + same, repr(self.text[same:]))

    def heads(self) -> tuple[set[str], bool]:
        return {self.text}, True


@dataclass
class Plot:
    """Names the plot; has no text."""

    name: str
    bits = 0.0

    def tell(self, teller: Teller) -> None:
        teller.plot = self.name

    def read(self, reader: Reader) -> bool:
        reader.plot = self.name
        return True

    def heads(self) -> tuple[set[str], bool]:
        return {""}, True


@dataclass
class Slot:
    """What a choice and a reference have in common: one word out of a group, in one form."""

    group: str
    kind: str
    form: str

    @cached_property
    def surfaces(self) -> frozenset[str]:
        """Every surface recognised here, the wrong ones included."""
        return frozenset(_surfaces(self.group, self.form))

    def match(self, reader: Reader) -> str | None:
        found = _pattern(self.surfaces).match(reader.text, reader.at)
        return found.group() if found else None

    def heads(self) -> tuple[set[str], bool]:
        return set(self.surfaces), True


class Pick(Slot):
    """A free, uniform choice of a word, perhaps remembered, perhaps other than words remembered before."""

    def __init__(self, table: str, form: str, variable: str, others: tuple[str, ...]) -> None:
        super().__init__(*_group(table), form)
        self.table, self.entries, self.variable, self.others = table, TABLES[table], variable, others
        self.size = len(self.entries)
        self.bits = math.log2(self.size - len(others))
        self.few = _small(table)
        self.few_bits = math.log2(len(self.few) - len(others))

    @cached_property
    def pool(self) -> dict[str, Entry]:
        return {entry[self.form]: entry for entry in self.entries}

    @cached_property
    def surfaces(self) -> frozenset[str]:
        tolerant = self.table in TOLERANT or self.table.startswith("m_")
        return super().surfaces if tolerant else frozenset(self.pool)

    def tell(self, teller: Teller) -> None:
        entries = self.few if teller.small else self.entries
        entry = entries[int(teller.random() * len(entries))]
        if self.others:
            taken = [teller.world[other] for other in self.others]
            while any(entry is other for other in taken):
                entry = entries[int(teller.random() * len(entries))]
        if self.variable:
            teller.world[self.variable] = entry
        teller.text.append(entry[self.form])
        teller.bits += self.few_bits if teller.small else self.bits

    def read(self, reader: Reader) -> bool:
        found = self.match(reader)
        if found is None:
            return reader.fail(reader.at, f"a word of {self.table!r}")
        if found not in self.pool:
            reader.violate(self.kind, f"a word of {self.table!r}", found)
        entry = self.pool.get(found) or _surfaces(self.group, self.form)[found]
        if any(entry is reader.world[other] for other in self.others):
            reader.violate(self.kind, f"another word of {self.table!r} than before", found)
        if self.variable:
            reader.world[self.variable] = entry
        reader.at += len(found)
        reader.bits += self.bits
        reader.small_bits += self.few_bits if any(entry is known for known in self.few) else math.inf
        return True


class Reference(Slot):
    """A word that must be the one remembered."""

    bits = 0.0

    def __init__(self, variable: str, form: str, table: str) -> None:
        group, kind = _group(table)
        pronoun = form.lower() in PRONOUNS["it"]
        super().__init__(group, "pronouns" if pronoun else ROLES.get(variable, kind), form)
        self.variable = variable

    def tell(self, teller: Teller) -> None:
        teller.text.append(teller.world[self.variable][self.form])

    def read(self, reader: Reader) -> bool:
        found, expected = self.match(reader), reader.world[self.variable].get(self.form, "")
        if found is None:
            return reader.fail(reader.at, f'"{expected}"')
        if found != expected:
            reader.violate(self.kind, f'"{expected}" as before', found)
        reader.at += len(found)
        return True


class Rule:
    """A uniform choice among alternatives, each a sequence of elements."""

    def __init__(self, name: str, alternatives: Iterable[Iterable[Element]]) -> None:
        self.name = name
        self.alternatives = [tuple(alternative) for alternative in alternatives]
        self.size = len(self.alternatives)
        self.few = SMALL_PLOTS if name == "plot" else self.size  # the small world has so many of them, the first ones
        self.choice, self.few_choice = math.log2(self.size), math.log2(self.few)
        self.bits = self.choice + sum(e.bits for a in self.alternatives for e in a) / self.size

    def tell(self, teller: Teller) -> None:
        size, bits = (self.few, self.few_choice) if teller.small else (self.size, self.choice)
        teller.bits += bits
        for element in self.alternatives[int(teller.random() * size)]:
            element.tell(teller)

    def read(self, reader: Reader) -> bool:
        at, bits, violations = reader.at, (reader.bits, reader.small_bits), len(reader.violations)
        for place, alternative in enumerate(self.alternatives):
            if all(element.read(reader) for element in alternative):
                reader.bits += self.choice
                reader.small_bits += self.few_choice if place < self.few else math.inf
                return True
            reader.at, (reader.bits, reader.small_bits) = at, bits
            del reader.violations[violations:]
        return False

    def heads(self) -> tuple[set[str], bool]:
        return self._heads

    @cached_property
    def _heads(self) -> tuple[set[str], bool]:
        parts = [_heads(alternative) for alternative in self.alternatives]
        return set().union(*(strings for strings, _ in parts)), all(whole for _, whole in parts)


# --- From the written grammar to elements ---------------------------------------------------------------------------

_PART = re.compile(
    r"<(?P<plot>[^>]+)> ?"
    r"|\[(?:(?P<set>\w+)=)?(?P<pick>\w+)(?:\.(?P<form>\w+))?(?P<others>(?:!\w+)*)(?::(?P<argument>\w+))?\]"
    r"|\{(?:(?P<variable>\w+)\.)?(?P<reference>\w+)\}"
)


class _Compiler:
    """Turns the written rules into elements; each rule is compiled once, when it is first used."""

    def __init__(self, grammar: str) -> None:
        self.sources: dict[str, list[str]] = {}
        self.rules: dict[str, Rule] = {}
        self.tables: dict[str, str] = {}  # remembered name -> a table of its group
        sources: list[str] = []
        for line in _lines(grammar):
            if line.startswith("- "):
                sources.append(line[2:].replace(" / ", "\n\n"))
            elif line:
                sources = self.sources.setdefault(line.rstrip(":"), [])

    def rule(self, name: str, argument: str = "") -> Rule:
        key = f"{name}:{argument}" if argument else name
        if key not in self.rules:
            sources = [source.replace("*", argument) for source in self.sources[name]]
            self.rules[key] = Rule(key, [list(self.elements(source)) for source in sources])
        return self.rules[key]

    def elements(self, source: str) -> Iterator[Element]:
        at = 0
        for part in _PART.finditer(source):
            if part.start() > at:
                yield Text(source[at : part.start()])
            at = part.end()
            yield from self.element(part)
        if at < len(source):
            yield Text(source[at:])

    def element(self, part: re.Match[str]) -> Iterator[Element]:
        if part["plot"]:
            yield Plot(part["plot"])
        elif part["reference"]:
            yield self.reference(part["variable"], part["reference"])
        elif part["pick"] in TABLES:
            yield self.pick(part)
        else:
            yield self.rule(part["pick"], part["argument"] or "")

    def pick(self, part: re.Match[str]) -> Pick:
        if part["set"]:
            self.tables[part["set"]] = part["pick"]
        return Pick(part["pick"], part["form"] or "", part["set"] or "", tuple((part["others"] or "").split("!")[1:]))

    def reference(self, variable: str | None, name: str) -> Reference:
        if variable:
            return Reference(variable, name, self.tables[variable])
        if name.lower() in PRONOUNS["it"]:
            return Reference("h", name, self.tables["h"])
        return Reference(name, "", self.tables[name])


_COMPILER = _Compiler(GRAMMAR)
STORY = _COMPILER.rule("story")
PLOTS: tuple[str, ...] = tuple(
    element.name
    for (plot,) in _COMPILER.rule("plot").alternatives
    if isinstance(plot, Rule)
    for element in plot.alternatives[0]
    if isinstance(element, Plot)
)
"""The names of the plots; each is equally likely."""


# --- Is every text derived in one way only? -------------------------------------------------------------------------

_HEADS = 5000  # heads are spelled out word by word as long as there are no more than so many


def _heads(elements: Iterable[Element]) -> tuple[set[str], bool]:
    """Strings such that every instance of the sequence begins with one, and whether they are whole instances."""
    heads = {""}
    for element in elements:
        more, whole = element.heads()
        if len(heads) > 1 and len(heads) * len(more) > _HEADS:
            return heads, False
        heads = {head + tail for head in heads for tail in more}
        if not whole:
            return heads, False
    return heads, True


def _alike(one: Element, other: Element) -> bool:
    """Whether both elements match exactly the same strings."""
    if isinstance(one, Slot) and isinstance(other, Slot):
        return one.surfaces == other.surfaces
    return one is other or (isinstance(one, Text) and isinstance(other, Text) and one.text == other.text)


def _prefixed(ones: set[str], others: set[str]) -> str | None:
    """One of `ones` that begins with one of `others`."""
    shortest: list[str] = []  # in order, without those that begin with an earlier one
    for other in sorted(others):
        if not shortest or not other.startswith(shortest[-1]):
            shortest.append(other)
    for one in sorted(ones):
        before = bisect.bisect_right(shortest, one)
        if before and one.startswith(shortest[before - 1]):
            return one
    return None


def _confusion(one: tuple[Element, ...], other: tuple[Element, ...]) -> str | None:
    """A beginning that two alternatives share, or None when the text always tells them apart."""
    shared = sum(1 for _ in itertools.takewhile(lambda pair: _alike(*pair), zip(one, other, strict=False)))
    ones, others = _heads(one[shared:])[0], _heads(other[shared:])[0]
    return _prefixed(ones, others) or _prefixed(others, ones)


def _reachable(element: Element, seen: dict[int, Rule]) -> dict[int, Rule]:
    """All rules used from this element on, by identity."""
    if isinstance(element, Rule) and id(element) not in seen:
        seen[id(element)] = element
        for part in itertools.chain.from_iterable(element.alternatives):
            _reachable(part, seen)
    return seen


def _slot_defects(slot: Slot) -> Iterator[str]:
    """Words of one slot of which one could be read in the place of another."""
    for word, longer in itertools.permutations(sorted(slot.surfaces), 2):
        if longer.startswith(word) and not longer[len(word)].isalpha():
            yield f"{word!r} is the beginning of {longer!r}"
    if isinstance(slot, Pick) and len(slot.pool) != slot.size:
        yield f"a word stands twice in {slot.table!r}"


def _sequence_defects(elements: tuple[Element, ...]) -> Iterator[str]:
    """Words that do not end where a word ends."""
    for one, other in itertools.pairwise(elements):
        open_end = isinstance(one, Slot | Rule) and not (isinstance(other, Text) and not other.text[0].isalpha())
        if open_end:
            yield f"no word boundary before {other}"


def defects(root: Rule = STORY) -> list[str]:
    """Everything that might give one text two derivations; empty for a sound grammar.

    Sufficient, not necessary: alternatives must differ within a few words from where they begin to differ.
    """
    found = []
    for rule in _reachable(root, {}).values():
        for one, other in itertools.combinations(rule.alternatives, 2):
            if (shared := _confusion(one, other)) is not None:
                found.append(f"{rule.name}: two alternatives begin with {shared!r}")
        for alternative in rule.alternatives:
            slots = (element for element in alternative if isinstance(element, Slot))
            found += [f"{rule.name}: {d}" for slot in slots for d in _slot_defects(slot)]
            found += [f"{rule.name}: {d}" for d in _sequence_defects(alternative)]
    return found


# --- Writing, scoring, checking -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Story:
    """A story, its plot, and the log2 of the probability of exactly this text."""

    text: str
    plot: str
    log2_probability: float


@dataclass(frozen=True)
class Report:
    """What `check` found; plot and probability are None when they cannot be known. The probability in the small world is
    that of the same text there: -infinity when it has a word that the small world lacks."""

    parses: bool
    violations: tuple[Violation, ...]
    plot: str | None
    log2_probability: float | None
    small_log2_probability: float | None = None

    @property
    def consistent(self) -> bool:
        """Whether the text is a story of this world without any contradiction."""
        return self.parses and not self.violations


def _tell(seed: int, index: int, small: bool = False) -> Teller:
    """One story. A source of its own for each makes it independent of all others."""
    teller = Teller(random.Random(f"{WORLD_VERSION}:{seed}:{index}"), small)
    STORY.tell(teller)
    return teller


def story(seed: int, index: int, small: bool = False) -> Story:
    """Story number `index` of `seed`; the same on every machine. The small world has the same plots and fewer words."""
    teller = _tell(seed, index, small)
    return Story("".join(teller.text), teller.plot, -teller.bits)


def stories(seed: int = 42, start: int = 0, count: int | None = None, small: bool = False) -> Iterator[str]:
    """The texts of `count` stories from number `start` on, without end when `count` is None."""
    for index in itertools.count(start) if count is None else range(start, start + count):
        yield "".join(_tell(seed, index, small).text)


def opening(seed: int, index: int) -> str:
    """The first sentence of a story, as a prompt."""
    text = story(seed, index).text
    return text[: text.index(".") + 1]


def check(text: str) -> Report:
    """Follow any text and report what is wrong with it. Never raises; takes time linear in the length of a story."""
    reader = Reader(text)
    whole = STORY.read(reader)
    if whole and reader.at < len(text):
        whole = reader.fail(reader.at, "the end of the story")
    if not whole:
        plot, violations = reader.met
        grammar = Violation("grammar", reader.furthest, _unreadable(reader))
        return Report(False, (*violations, grammar), plot, None)
    if reader.violations:
        return Report(True, tuple(reader.violations), reader.plot, None)
    return Report(True, (), reader.plot, -reader.bits, -reader.small_bits)


def _unreadable(reader: Reader) -> str:
    there = reader.text[reader.furthest : reader.furthest + 20]
    return f"expected {reader.wanted}, found {ascii(there) if there else 'the end of the text'}"


def log2_probability(text: str, small: bool = False) -> float:
    """Log2 of the probability of exactly this text, -infinity when the small world lacks one of its words.

    Raises:
        ValueError: the text is not a consistent story of this world; the message says where and why.
    """
    report = check(text)
    found = report.small_log2_probability if small else report.log2_probability
    if found is None:
        first = report.violations[0]
        raise ValueError(f"not a story of this world at character {first.position}: {first.kind}, {first.message}")
    return found


def entropy_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits of information per UTF-8 byte of the stories: what no model can be better than. Stories that are all of the
    small world are measured by that.

    Raises:
        ValueError: there is no text, or one that is not a consistent story of this world.
    """
    texts = list(texts)
    size = sum(len(text.encode()) for text in texts)
    if not size:
        raise ValueError("there are no stories to measure")
    small = -sum(log2_probability(text, small=True) for text in texts)
    return (small if small < math.inf else -sum(log2_probability(text) for text in texts)) / size
