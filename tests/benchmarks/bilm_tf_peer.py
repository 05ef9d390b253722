"""bilm-tf as its `train` and `test` run it, for the Python of an environment with `bilm` and TensorFlow.

    python bilm_tf_peer.py '{"what": "train", "train": GLOB, "vocab": FILE, "options": {...}, "threads": 2}'

Started by the benchmarks' --peer PYTHON. what: train (steps of training), evaluate (batches of `test`, one position of
each row, random weights), data (batches of its data sets alone). Each line on standard input is a number of steps; each
answer is a JSON line with their positions, seconds and CPU seconds, reading and encoding of text included.
"""

import json
import os
import sys
import time


def main():
    case = json.loads(sys.argv[1])
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow.compat.v1 as tf

    tf.disable_v2_behavior()
    tf.logging.set_verbosity(tf.logging.ERROR)
    sys.modules["tensorflow"] = tf
    from bilm import training
    from bilm.data import BidirectionalLMDataset, UnicodeCharsVocabulary

    options = case["options"]
    vocabulary = UnicodeCharsVocabulary(case["vocab"], options["char_cnn"]["max_characters_per_token"])
    options["n_tokens_vocab"] = vocabulary.size
    answers = sys.stdout
    with open(os.devnull, "w") as nowhere:  # it prints every variable, and each shard that it reads
        sys.stdout = nowhere
        training_set = case["what"] != "evaluate"
        data = BidirectionalLMDataset(case["train"], vocabulary, test=False, shuffle_on_load=training_set)
        build = {"train": train_step, "evaluate": evaluation, "data": reading}[case["what"]]
        step = build(tf, training, options, data, case["threads"])
        for line in sys.stdin:
            start, cpu = time.perf_counter(), time.process_time()
            positions = sum(step() for _ in range(int(line)))
            record = {
                "positions": positions,
                "seconds": time.perf_counter() - start,
                "cpu_seconds": time.process_time() - cpu,
            }
            print(json.dumps(record), file=answers, flush=True)


def train_step(tf, training, options, data, threads):
    number = tf.get_variable("global_step", [], initializer=tf.constant_initializer(0), trainable=False)
    optimizer = tf.train.AdagradOptimizer(options["learning_rate"], initial_accumulator_value=1.0)
    with tf.variable_scope("lm"):
        model = training.LanguageModel(options, True)
        gradients = optimizer.compute_gradients(
            model.total_loss * options["unroll_steps"],
            aggregation_method=tf.AggregationMethod.EXPERIMENTAL_TREE,
        )
    gradients = training.average_gradients([gradients], options["batch_size"], options)
    gradients, norms = training.clip_grads(gradients, options, True, number)
    loss = tf.exp(model.total_loss)
    update = optimizer.apply_gradients(gradients, global_step=number)
    summary = tf.summary.merge([tf.summary.scalar("train_perplexity", loss), *norms])
    return run_of(tf, training, model, options, data, threads, [update, summary, loss])


def evaluation(tf, training, options, data, threads):
    options = {**options, "unroll_steps": 1}
    with tf.variable_scope("lm"):
        model = training.LanguageModel(options, False)
    return run_of(tf, training, model, options, data, threads, [model.total_loss])


def reading(tf, training, options, data, threads):
    rows, unroll = options["batch_size"], options["unroll_steps"]
    batches = data.iter_batches(rows, unroll)

    def step():
        next(batches)
        return rows * unroll

    return step


def run_of(tf, training, model, options, data, threads, fetched):
    session = tf.Session(
        config=tf.ConfigProto(intra_op_parallelism_threads=threads, inter_op_parallelism_threads=threads)
    )
    session.run(tf.global_variables_initializer())
    rows, unroll = options["batch_size"], options["unroll_steps"]
    batches = data.iter_batches(rows, unroll)

    def feed():
        return training._get_feed_dict_from_X(next(batches), 0, rows, model, True, True)

    states = session.run(list(model.init_lstm_state), feed_dict=feed())

    def step():
        nonlocal states
        fed = {**dict(zip(model.init_lstm_state, states, strict=True)), **feed()}
        states = session.run([*fetched, *model.final_lstm_state], feed_dict=fed)[len(fetched) :]
        return rows * unroll

    return step


if __name__ == "__main__":
    main()
