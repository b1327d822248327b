"""Metal objects that hide a weapon from the float network: do they hide it from the quantized one?

    python xray.py page.html      seconds, on a small network that has seen few bags

of 100 bags 32 are right; 32 after rounding
objects crafted on the float network cost it 24 points, the other one 28
objects crafted on the quantized network cost it 26 points, the other one 28
"""

import sys

import qtk
from qtk.physical import classifier, scene


def main(page: str | None = None) -> qtk.XRay:
    bags = scene.draw(300, seed=0)
    model = classifier.train(classifier.cnn((16, 32, 32)), bags, epochs=12, progress=False)
    qmodel = qtk.quantize(model, w=4, a=8, calib=[bags.images[:64]], preset="fast", progress=False)
    craft, test = scene.draw(16, seed=1), scene.draw(50, seed=2)
    result = qtk.xray(model, qmodel, craft, test, objects=1, patch=8, progress=False)
    clean = result.rows[0]
    right, rounded = (100 * n // clean.samples for n in (clean.correct, clean.correct_quantized))
    print(f"of 100 bags {right} are right; {rounded} after rounding")
    for crafted, other in (("float", "quantized"), ("quantized", "float")):
        own, there = (100 * result.drop("shaped", crafted, name) for name in (crafted, other))
        print(f"objects crafted on the {crafted} network cost it {own:.0f} points, "
              f"the other one {there:.0f}")  # fmt: skip
    if page:
        qtk.trust_page(result, page)  # with pictures: scenes, thickness, attacked scenes
    return result


if __name__ == "__main__":
    main(*sys.argv[1:])
