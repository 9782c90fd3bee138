"""The papers behind every number: keys, short citations and BibTeX."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["REFERENCES", "Reference", "bibtex", "check_keys", "cite"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """One source.

    Attributes:
        key: BibTeX key.
        authors: ``A and B`` as BibTeX wants it; None where the paper is cited by title alone.
        title: Title.
        year: Year of the version used.
        venue: Journal or conference, or ``"arXiv:…"``.
        kind: BibTeX entry type.
    """

    key: str
    title: str
    year: int
    venue: str
    authors: str | None = None
    kind: str = "misc"

    def short(self) -> str:
        """One line for a message or a table: authors or title, year and venue."""
        return f"{self.authors or self.title} ({self.year}), {self.venue}"

    def bibtex(self) -> str:
        """The entry, ready for a ``.bib`` file."""
        where = {"article": "journal", "inproceedings": "booktitle"}.get(self.kind, "note")
        fields = {"author": self.authors, "title": f"{{{self.title}}}", "year": str(self.year)}
        fields[where] = self.venue
        body = "".join(f"  {name} = {{{text}}},\n" for name, text in fields.items() if text)
        return f"@{self.kind}{{{self.key},\n{body}}}"


_ALL = (
    Reference(
        key="p1-implicit-2024",
        title="On the Implicit Relation between Low-Rank Adaptation and Differential Privacy",
        year=2024,
        venue="arXiv:2409.17538, versions 2 and 3",
    ),
    Reference(
        key="p2-projections-2026",
        title="LoRA and Privacy: When Random Projections Help (and When They Don't)",
        year=2026,
        venue="arXiv:2601.21719",
    ),
    Reference(
        key="p3-denoising-2025",
        title="Re-examining Low Rank adaptation for private LLM fine-tuning",
        year=2025,
        venue="arXiv:2510.01137",
    ),
    Reference(
        key="flora-2024",
        authors="Hao, Yongchang and Cao, Yanshuai and Mou, Lili",
        title="Flora: Low-Rank Adapters Are Secretly Gradient Compressors",
        year=2024,
        venue="ICML 2024, arXiv:2402.03293",
        kind="inproceedings",
    ),
    Reference(
        key="hu-lora-2022",
        authors="Hu, Edward J. and Shen, Yelong and Wallis, Phillip and others",
        title="LoRA: Low-Rank Adaptation of Large Language Models",
        year=2022,
        venue="ICLR 2022, arXiv:2106.09685",
        kind="inproceedings",
    ),
    Reference(
        key="zhang-lora-fa-2023",
        authors="Zhang, Longteng and Zhang, Lin and Shi, Shaohuai and Chu, Xiaowen and Li, Bo",
        title="LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models "
        "Fine-tuning",
        year=2023,
        venue="arXiv:2308.03303",
    ),
    Reference(
        key="mironov-bits-2012",
        authors="Mironov, Ilya",
        title="On Significance of the Least Significant Bits for Differential Privacy",
        year=2012,
        venue="ACM CCS 2012",
        kind="inproceedings",
    ),
    Reference(
        key="mironov-rdp-2017",
        authors="Mironov, Ilya",
        title="Rényi Differential Privacy",
        year=2017,
        venue="IEEE CSF 2017, arXiv:1702.07476",
        kind="inproceedings",
    ),
    Reference(
        key="mironov-sampled-2019",
        authors="Mironov, Ilya and Talwar, Kunal and Zhang, Li",
        title="Rényi Differential Privacy of the Sampled Gaussian Mechanism",
        year=2019,
        venue="arXiv:1908.10530",
    ),
    Reference(
        key="canonne-discrete-2020",
        authors="Canonne, Clément L. and Kamath, Gautam and Steinke, Thomas",
        title="The Discrete Gaussian for Differential Privacy",
        year=2020,
        venue="NeurIPS 2020, arXiv:2004.00010",
        kind="inproceedings",
    ),
    Reference(
        key="balle-hypothesis-2020",
        authors="Balle, Borja and Barthe, Gilles and Gaboardi, Marco and Hsu, Justin and Sato, "
        "Tetsuya",
        title="Hypothesis Testing Interpretations and Rényi Differential Privacy",
        year=2020,
        venue="AISTATS 2020, arXiv:1905.09982",
        kind="inproceedings",
    ),
    Reference(
        key="kairouz-composition-2015",
        authors="Kairouz, Peter and Oh, Sewoong and Viswanath, Pramod",
        title="The Composition Theorem for Differential Privacy",
        year=2015,
        venue="ICML 2015, arXiv:1311.0776",
        kind="inproceedings",
    ),
    Reference(
        key="koskela-accountant-2020",
        authors="Koskela, Antti and Jälkö, Joonas and Honkela, Antti",
        title="Computing Tight Differential Privacy Guarantees Using FFT",
        year=2020,
        venue="AISTATS 2020, arXiv:1906.03049",
        kind="inproceedings",
    ),
    Reference(
        key="doroshenko-dots-2022",
        authors="Doroshenko, Vadym and Ghazi, Badih and Kamath, Pritish and Kumar, Ravi and "
        "Manurangsi, Pasin",
        title="Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions",
        year=2022,
        venue="PoPETs 2022(4), arXiv:2207.04380",
        kind="article",
    ),
    Reference(
        key="zhu-dominating-2022",
        authors="Zhu, Yuqing and Dong, Jinshuo and Wang, Yu-Xiang",
        title="Optimal Accounting of Differential Privacy via Characteristic Function",
        year=2022,
        venue="AISTATS 2022, arXiv:2106.08567",
        kind="inproceedings",
    ),
    Reference(
        key="dong-gaussian-2022",
        authors="Dong, Jinshuo and Roth, Aaron and Su, Weijie J.",
        title="Gaussian Differential Privacy",
        year=2022,
        venue="Journal of the Royal Statistical Society B 84(1), arXiv:1905.02383",
        kind="article",
    ),
    Reference(
        key="balle-subsampling-2018",
        authors="Balle, Borja and Barthe, Gilles and Gaboardi, Marco",
        title="Privacy Amplification by Subsampling: Tight Analyses via Couplings and Divergences",
        year=2018,
        venue="NeurIPS 2018, arXiv:1807.01647",
        kind="inproceedings",
    ),
    Reference(
        key="balle-wang-2018",
        authors="Balle, Borja and Wang, Yu-Xiang",
        title="Improving the Gaussian Mechanism for Differential Privacy: Analytical Calibration "
        "and Optimal Denoising",
        year=2018,
        venue="ICML 2018, arXiv:1805.06530",
        kind="inproceedings",
    ),
    Reference(
        key="abadi-dpsgd-2016",
        authors="Abadi, Martín and Chu, Andy and Goodfellow, Ian and McMahan, H. Brendan and "
        "Mironov, Ilya and Talwar, Kunal and Zhang, Li",
        title="Deep Learning with Differential Privacy",
        year=2016,
        venue="ACM CCS 2016, arXiv:1607.00133",
        kind="inproceedings",
    ),
    Reference(
        key="yousefpour-opacus-2021",
        authors="Yousefpour, Ashkan and Shilov, Igor and Sablayrolles, Alexandre and others",
        title="Opacus: User-Friendly Differential Privacy Library in PyTorch",
        year=2021,
        venue="arXiv:2109.12298",
    ),
    Reference(
        key="matousek-jl-2008",
        authors="Matoušek, Jiří",
        title="On variants of the Johnson–Lindenstrauss lemma",
        year=2008,
        venue="Random Structures & Algorithms 33(2)",
        kind="article",
    ),
    Reference(
        key="shevtsova-2013",
        authors="Shevtsova, Irina",
        title="On the absolute constants in the Berry–Esseen inequality and its structural and "
        "nonuniform improvements",
        year=2013,
        venue="Informatics and its Applications 7(1)",
        kind="article",
    ),
    Reference(
        key="gaunt-vg-2014",
        authors="Gaunt, Robert E.",
        title="Variance-Gamma approximation via Stein's method",
        year=2014,
        venue="Electronic Journal of Probability 19",
        kind="article",
    ),
    Reference(
        key="dembo-inequalities-1991",
        authors="Dembo, Amir and Cover, Thomas M. and Thomas, Joy A.",
        title="Information theoretic inequalities",
        year=1991,
        venue="IEEE Transactions on Information Theory 37(6)",
        kind="article",
    ),
    Reference(
        key="massart-dkw-1990",
        authors="Massart, Pascal",
        title="The Tight Constant in the Dvoretzky–Kiefer–Wolfowitz Inequality",
        year=1990,
        venue="Annals of Probability 18(3)",
        kind="article",
    ),
    Reference(
        key="davidson-szarek-2001",
        authors="Davidson, Kenneth R. and Szarek, Stanislaw J.",
        title="Local Operator Theory, Random Matrices and Banach Spaces",
        year=2001,
        venue="Handbook of the Geometry of Banach Spaces, vol. 1",
    ),
    Reference(
        key="benaych-spikes-2012",
        authors="Benaych-Georges, Florent and Nadakuditi, Raj Rao",
        title="The singular values and vectors of low rank perturbations of large rectangular "
        "random matrices",
        year=2012,
        venue="Journal of Multivariate Analysis 111, arXiv:1103.2221",
        kind="article",
    ),
    Reference(
        key="gavish-threshold-2014",
        authors="Gavish, Matan and Donoho, David L.",
        title="The Optimal Hard Threshold for Singular Values is 4/√3",
        year=2014,
        venue="IEEE Transactions on Information Theory 60(8), arXiv:1305.5870",
        kind="article",
    ),
    Reference(
        key="gavish-shrinkage-2017",
        authors="Gavish, Matan and Donoho, David L.",
        title="Optimal Shrinkage of Singular Values",
        year=2017,
        venue="IEEE Transactions on Information Theory 63(4), arXiv:1405.7511",
        kind="article",
    ),
    Reference(
        key="gil-renyi-2013",
        authors="Gil, Manuel and Alajaji, Fady and Linder, Tamás",
        title="Rényi divergence measures for commonly used univariate continuous distributions",
        year=2013,
        venue="Information Sciences 249",
        kind="article",
    ),
    Reference(
        key="muirhead-1982",
        authors="Muirhead, Robb J.",
        title="Aspects of Multivariate Statistical Theory",
        year=1982,
        venue="Wiley",
        kind="book",
    ),
    Reference(
        key="clopper-pearson-1934",
        authors="Clopper, C. J. and Pearson, E. S.",
        title="The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial",
        year=1934,
        venue="Biometrika 26(4)",
        kind="article",
    ),
    Reference(
        key="jagielski-auditing-2020",
        authors="Jagielski, Matthew and Ullman, Jonathan and Oprea, Alina",
        title="Auditing Differentially Private Machine Learning: How Private is Private SGD?",
        year=2020,
        venue="NeurIPS 2020, arXiv:2006.07709",
        kind="inproceedings",
    ),
    Reference(
        key="steinke-one-run-2023",
        authors="Steinke, Thomas and Nasr, Milad and Jagielski, Matthew",
        title="Privacy Auditing with One (1) Training Run",
        year=2023,
        venue="NeurIPS 2023, arXiv:2305.08846",
        kind="inproceedings",
    ),
    Reference(
        key="mahloujifar-fdp-2024",
        authors="Mahloujifar, Saeed and Melis, Luca and Chaudhuri, Kamalika",
        title="Auditing f-Differential Privacy in One Run",
        year=2024,
        venue="arXiv:2410.22235",
    ),
    Reference(
        key="hoeffding-1963",
        authors="Hoeffding, Wassily",
        title="Probability Inequalities for Sums of Bounded Random Variables",
        year=1963,
        venue="Journal of the American Statistical Association 58(301)",
        kind="article",
    ),
    Reference(
        key="ye-attacks-2022",
        authors="Ye, Jiayuan and Maddi, Aadyaa and Murakonda, Sasi Kumar and Bindschaedler, "
        "Vincent and Shokri, Reza",
        title="Enhanced Membership Inference Attacks against Machine Learning Models",
        year=2022,
        venue="ACM CCS 2022, arXiv:2111.09679",
        kind="inproceedings",
    ),
    Reference(
        key="carlini-lira-2022",
        authors="Carlini, Nicholas and Chien, Steve and Nasr, Milad and Song, Shuang and Terzis, "
        "Andreas and Tramèr, Florian",
        title="Membership Inference Attacks From First Principles",
        year=2022,
        venue="IEEE S&P 2022, arXiv:2112.03570",
        kind="inproceedings",
    ),
    Reference(
        key="zarifzadeh-rmia-2024",
        authors="Zarifzadeh, Sajjad and Liu, Philippe and Shokri, Reza",
        title="Low-Cost High-Power Membership Inference Attacks",
        year=2024,
        venue="ICML 2024, arXiv:2312.03262",
        kind="inproceedings",
    ),
    Reference(
        key="carlini-secrets-2019",
        authors="Carlini, Nicholas and Liu, Chang and Erlingsson, Úlfar and Kos, Jernej and Song, "
        "Dawn",
        title="The Secret Sharer: Evaluating and Testing Unintended Memorization in Neural "
        "Networks",
        year=2019,
        venue="USENIX Security 2019, arXiv:1802.08232",
        kind="inproceedings",
    ),
    Reference(
        key="shi-min-k-2024",
        authors="Shi, Weijia and Ajith, Anirudh and Xia, Mengzhou and others",
        title="Detecting Pretraining Data from Large Language Models",
        year=2024,
        venue="ICLR 2024, arXiv:2310.16789",
        kind="inproceedings",
    ),
    Reference(
        key="zhang-min-k-plus-plus-2025",
        authors="Zhang, Jingyang and Sun, Jingwei and Yeats, Eric and others",
        title="Min-K%++: Improved Baseline for Detecting Pre-Training Data from Large Language "
        "Models",
        year=2025,
        venue="ICLR 2025, arXiv:2404.02936",
        kind="inproceedings",
    ),
)

REFERENCES: dict[str, Reference] = {reference.key: reference for reference in _ALL}


def cite(*keys: str) -> str:
    """Short citations of ``keys``, joined by semicolons.

    >>> cite("mironov-rdp-2017")
    'Mironov, Ilya (2017), IEEE CSF 2017, arXiv:1702.07476'
    """
    return "; ".join(_get(key).short() for key in keys)


def bibtex(*keys: str) -> str:
    """BibTeX of ``keys``, or of all references when none is named."""
    return "\n\n".join(_get(key).bibtex() for key in (keys or tuple(REFERENCES)))


def check_keys(*keys: str) -> None:
    """Raise ValueError for an unknown key: now, not when a paper is written."""
    for key in keys:
        if key not in REFERENCES:
            raise ValueError(
                f"{key!r} is no reference of this library; known: {', '.join(REFERENCES)}."
            )


def _get(key: str) -> Reference:
    check_keys(key)
    return REFERENCES[key]
