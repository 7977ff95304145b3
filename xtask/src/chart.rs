//! The chart of a bench run: time over native by benchmark, as horizontal bars on a logarithmic scale.

use crate::bench::{Results, Row, Runner};
use std::fmt::Write;

const LEFT: f64 = 130.0;
const WIDTH: f64 = 860.0;
const RIGHT: f64 = 60.0;
const TOP: f64 = 64.0;
const BAR: f64 = 9.0;
const PITCH: f64 = 26.0;
const SERIES: [(Runner, &str, &str); 2] =
    [(Runner::Qemu, "QEMU TCG", "#b8b8c4"), (Runner::Anyvisor, "anyvisor", "#2f6fb5")];

/// The chart as an SVG document.
pub fn svg(results: &Results) -> String {
    let rows: Vec<&Row> = results.rows.iter().filter(|r| r.over_native(Runner::Anyvisor).is_some()).collect();
    let ratios = rows.iter().flat_map(|r| SERIES.iter().filter_map(|(runner, ..)| r.over_native(*runner)));
    let (low, high) = ratios.fold((0.5f64, 2.0f64), |(low, high), v| (low.min(v), high.max(v)));
    let (low, high) = (low.log2().floor(), high.log2().ceil());
    let scale = |ratio: f64| LEFT + (ratio.log2() - low) / (high - low) * (WIDTH - LEFT - RIGHT);
    let height = TOP + rows.len() as f64 * PITCH + 20.0;
    let mut text = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"{LEFT}\" y=\"20\" font-size=\"15\">Time over native (logarithmic; shorter is better)</text>\n"
    );
    let mut add = |element: String| writeln!(text, "{element}").expect("writing to a string");
    for (i, (_, name, colour)) in SERIES.iter().enumerate() {
        let x = LEFT + 110.0 * i as f64;
        add(format!("<rect x=\"{x}\" y=\"30\" width=\"10\" height=\"10\" fill=\"{colour}\"/>"));
        add(format!("<text x=\"{}\" y=\"39\">{name}</text>", x + 15.0));
    }
    for power in low as i32..=high as i32 {
        let ratio = 2f64.powi(power);
        let x = scale(ratio);
        let colour = if power == 0 { "#444" } else { "#ddd" };
        add(format!(
            "<line x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{:.1}\" stroke=\"{colour}\"/>",
            height - 20.0
        ));
        add(format!("<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#666\">{ratio}×</text>", TOP - 5.0));
    }
    for (i, row) in rows.iter().enumerate() {
        let y = TOP + PITCH * i as f64 + 4.0;
        let label = format!("{} ({})", row.name, row.class);
        add(format!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>", LEFT - 8.0, y + 13.0));
        for (j, (runner, _, colour)) in SERIES.iter().enumerate() {
            let Some(ratio) = row.over_native(*runner) else { continue };
            let (from, to) = (scale(1.0).min(scale(ratio)), scale(1.0).max(scale(ratio)));
            let y = y + BAR * j as f64;
            add(format!(
                "<rect x=\"{from:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>",
                (to - from).max(1.0)
            ));
            add(format!("<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"9\">{ratio:.2}</text>", to + 3.0, y + 8.0));
        }
    }
    text + "</svg>\n"
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn longer_times_draw_longer_bars() {
        let row = |name: &str, ours: f64| Row {
            name: name.into(),
            class: "int".into(),
            seconds: BTreeMap::from([(Runner::Native, 1.0), (Runner::Qemu, 9.0), (Runner::Anyvisor, ours)]),
        };
        let rows = vec![row("fast", 1.5), row("slow", 6.0)];
        let results = Results { rows, scale: 1.0, runs: 1, footprint: None, host: String::new() };
        let text = svg(&results);
        let widths: Vec<f64> = text
            .lines()
            .filter(|l| l.contains("height=\"9\"") && l.contains("#2f6fb5"))
            .map(|l| l.split("width=\"").nth(1).unwrap().split('"').next().unwrap().parse().unwrap())
            .collect();
        assert_eq!(widths.len(), 2);
        assert!(widths[1] > 3.0 * widths[0], "{widths:?}");
        assert!(text.ends_with("</svg>\n"));
    }
}
