# Five kinds of flowers in photographs from the web, long-tailed 20:1 (583 images, 208 px).
#
# Command   dino-adapters evaluate tasks/web/photos/recipe.py \
#               data.source=PHOTOS split=PHOTOS/splits.csv backbone=runs/a/export --out runs/photos
# Data      PHOTOS/CLASS/ID.jpg and PHOTOS/splits.csv (image, label, split, group): a sample of the
#           "flowers recognition" collection (A. Mamaev), mostly from Flickr.
# Licence   The photographs belong to their photographers: research and tests only, do not
#           republish single ones.
# Split     Fixed, in splits.csv: uploads close in number and near duplicates are one group, and a
#           group is in one part. 308 / 75 / 200 images; train is long-tailed, val and test are not.
# Expect    Classes are noisy. Colour statistics with logistic regression reach a balanced accuracy
#           of 0.24 with 1 image per class, 0.34 with 5 and 0.385 with all; chance is 0.2.
# Hardware  One CPU core.

data = dict(labels="folder")
size = 224
shots = [1, 3, 5]
draws = 10
