"""Run by ranks.py, once for each world size: fine-tuning on the host that is installed, in every layout of that size.

Arguments: folder with a student and its rows, JSON list of cases, output folder. Each case leaves its `loss.csv`.
"""

from cache_training_worker import worker_of_the_host
from workers import leave, process_group, run_cases


def main():
    with process_group():
        from nemo_minitron.hosts import host_of
        from nemo_minitron.settings.finetuning import Finetuning
        from nemo_minitron.settings.layout import Layout
        from nemo_minitron.settings.orders import FinetuneOrder

        worker = worker_of_the_host()

        def run_case(case, folder, out):
            made = out / case["name"]
            made.mkdir(exist_ok=True)
            layout, recipe = Layout(**case["layout"]), Finetuning(**case["recipe"])
            host_of().finetune(FinetuneOrder(folder / case["model"], folder / "rows", made, recipe, layout))
            worker.forget()

        run_cases(run_case)
    leave()


if __name__ == "__main__":
    main()
