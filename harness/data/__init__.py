"""From DATA on the command line to batches on the device.

    opening     from DATA to images: what it can be, and what a run says of it
    walk        the files below a folder as a tree, and why some of them are no images
    splits      where in a tree the training and validation images are, their classes and labels
    lists       text files that name images, and what is no such list
    tars        uncompressed tar files in the place of folders
    cifar       CIFAR-10 and CIFAR-100 as they are downloaded
    shapes      the drawn data set, for which nothing is downloaded
    captions    words for what was drawn, lists of images with captions, and words as numbers
    source      a split of a data set: images in memory or files, and labels
    images      reading one image file, good or bad, of 8 bits or more
    loading     worker processes, from files to batches
"""
