"""bilm-tf's training step, as its `train` runs it, for the Python of an environment with `bilm` and TensorFlow.

    python bilm_tf_peer.py '{"train": GLOB, "vocab": FILE, "options": {...}, "threads": 2}'

Started by `train_step.py --peer PYTHON`. Each line on standard input is a number of steps; each answer is a JSON line
with their positions, seconds and CPU seconds (reading and encoding of text included, as in ours).
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
    with open(os.devnull, "w") as nowhere:  # it prints every variable, and each shard that it reads
        answers, sys.stdout = sys.stdout, nowhere
        data = BidirectionalLMDataset(case["train"], vocabulary, test=False, shuffle_on_load=True)
        step = tf.get_variable("global_step", [], initializer=tf.constant_initializer(0), trainable=False)
        optimizer = tf.train.AdagradOptimizer(options["learning_rate"], initial_accumulator_value=1.0)
        with tf.variable_scope("lm"):
            model = training.LanguageModel(options, True)
            gradients = optimizer.compute_gradients(
                model.total_loss * options["unroll_steps"],
                aggregation_method=tf.AggregationMethod.EXPERIMENTAL_TREE,
            )
        gradients = training.average_gradients([gradients], options["batch_size"], options)
        gradients, norms = training.clip_grads(gradients, options, True, step)
        loss = tf.exp(model.total_loss)
        update = optimizer.apply_gradients(gradients, global_step=step)
        summary = tf.summary.merge([tf.summary.scalar("train_perplexity", loss), *norms])
        config = tf.ConfigProto(
            intra_op_parallelism_threads=case["threads"], inter_op_parallelism_threads=case["threads"]
        )
        with tf.Session(config=config) as session:
            session.run(tf.global_variables_initializer())
            rows, unroll = options["batch_size"], options["unroll_steps"]
            batches = data.iter_batches(rows, unroll)
            first = feed(next(batches), model, training, rows)
            states = session.run(list(model.init_lstm_state), feed_dict=first)
            for line in sys.stdin:
                start, cpu = time.perf_counter(), time.process_time()
                for _ in range(int(line)):
                    fed = dict(zip(model.init_lstm_state, states, strict=True))
                    fed.update(feed(next(batches), model, training, rows))
                    result = session.run([update, summary, loss, *model.final_lstm_state], feed_dict=fed)
                    states = result[3:]
                record = {
                    "positions": int(line) * rows * unroll,
                    "seconds": time.perf_counter() - start,
                    "cpu_seconds": time.process_time() - cpu,
                    "perplexity": float(result[2]),
                }
                print(json.dumps(record), file=answers, flush=True)


def feed(batch, model, training, rows):
    return training._get_feed_dict_from_X(batch, 0, rows, model, True, True)


if __name__ == "__main__":
    main()
