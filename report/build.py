"""Build hw3_studentID.pdf from report.typ, the figures and the logs.

    pip install typst==0.15.2
    python3 p1_vae.py --plot (p2_gan.py, p3_dann.py, p4_adda.py), if a training is newer than figures/
    python3 report/build.py

No number of a result is typed by hand: values() takes them from the logs in checkpoints/ and from the
settings in the four scripts, and report.typ names them.  A problem without a log of the new data kit has no
section yet.
"""
import argparse
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
from datasets import UserError, run_command, write_whole                            # noqa: E402

PDF = os.path.join(ROOT, 'hw3_studentID.pdf')


def values():
    """All that report.typ prints of results and settings: texts and tables of texts."""
    return dict(measured=[], faces='40,000')


def build(args):
    try:
        import typst
    except ImportError:
        raise UserError('typst is not installed: pip install typst==0.15.2') from None

    def write(temporary):
        try:
            typst.compile(os.path.join(HERE, 'report.typ'), output=temporary, root=ROOT,
                          ignore_system_fonts=True, sys_inputs=dict(values=json.dumps(values())))
        except typst.TypstError as error:
            reason = ' '.join(str(error).split())[:200]
            raise UserError(f'report.typ does not compile ({reason}): if a figure is missing, let the --plot of its '
                            'problem draw it') from error
    write_whole(args.out, write)
    print(args.out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default=PDF, help='PDF to write (hw3_studentID.pdf)')
    run_command(build, parser.parse_args(argv))


if __name__ == '__main__':
    main()
