//! The guest's speed around the migration: a plot for each cell, a strip for each engine.

use anyhow::Result;
use plotters::prelude::*;

use super::{Area, FAINT, INK, color, draw, problem, write};
use crate::record::{Outcome, Record};
use crate::report::cells::{Cell, Results};
use crate::report::format::number;

const WIDTH: u32 = 960;
const STRIP: u32 = 84;
const HEAD: u32 = 46;
const FOOT: u32 = 36;
/// The most that a guest's speed is drawn as.
const TOP: f64 = 1.2;

pub fn plots(results: &Results<'_>) -> Result<Vec<(String, String)>> {
    let mut plots = Vec::new();
    for cell in &results.cells {
        let runs: Vec<_> = cell.rows.iter().filter_map(|row| row.typical()).collect();
        if !runs.is_empty() {
            plots.push((format!("speed-{}.svg", cell.slug()), plot(cell, &runs)?));
        }
    }
    Ok(plots)
}

fn plot(cell: &Cell<'_>, runs: &[&Record]) -> Result<String> {
    let measured = || runs.iter().filter_map(|run| run.measured.as_ref());
    let times = || measured().flat_map(|m| m.speed.iter().map(|(at, _)| *at));
    let (first, last) = (times().fold(0.0, f64::min), times().fold(1.0, f64::max));
    draw(WIDTH, HEAD + STRIP * runs.len() as u32 + FOOT, |area| {
        let title = format!(
            "Guest speed (v/v0) over seconds since the start: {}",
            cell.title()
        );
        write(area, &title, (12, 8), 16, INK)?;
        let key = "solid line: migration starts; dashed: last tick at the source; dotted: the engine says it has ended";
        write(area, key, (12, 28), 11, INK)?;
        let (_, below) = area.split_vertically(HEAD);
        for (index, run) in runs.iter().enumerate() {
            let (_, rest) = below.split_vertically(STRIP * index as u32);
            let is_last = index + 1 == runs.len();
            let height = if is_last { STRIP + FOOT } else { STRIP };
            let (area, _) = rest.split_vertically(height);
            strip(&area, run, first..last, is_last)?;
        }
        Ok(())
    })
}

fn strip(area: &Area<'_>, run: &Record, span: std::ops::Range<f64>, is_last: bool) -> Result<()> {
    let Some(measured) = &run.measured else {
        return Ok(());
    };
    let color = color(&run.engine);
    let mut chart = ChartBuilder::on(area)
        .margin_top(18)
        .margin_left(8)
        .margin_right(14)
        .y_label_area_size(30)
        .x_label_area_size(if is_last { FOOT } else { 4 })
        .build_cartesian_2d(span.clone(), 0.0..TOP)
        .map_err(problem)?;
    let mut mesh = chart.configure_mesh();
    mesh.light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .y_labels(3)
        .y_label_formatter(&|v| format!("{v:.1}"))
        .label_style(("sans-serif", 11))
        .x_labels(if is_last { 12 } else { 0 });
    mesh.draw().map_err(problem)?;
    let steps = measured.speed.iter().flat_map(|(at, v)| {
        let v = v.clamp(0.0, TOP);
        [(*at, v), (at + measured.bin, v)]
    });
    let steps: Vec<_> = steps.map(|(at, v)| (at.min(span.end), v)).collect();
    let series = AreaSeries::new(steps, 0.0, color.mix(0.35)).border_style(color);
    chart.draw_series(series).map_err(problem)?;
    let upright = |at: f64| vec![(at, 0.0), (at, TOP)];
    let start = LineSeries::new(upright(0.0), INK.stroke_width(1));
    chart.draw_series(start).map_err(problem)?;
    if let Some(freeze) = measured.freeze {
        let line = DashedLineSeries::new(upright(freeze), 5, 3, INK.stroke_width(1));
        chart.draw_series(line).map_err(problem)?;
    }
    if let Some(total) = measured.total {
        let line = DashedLineSeries::new(upright(total), 1, 3, INK.stroke_width(1));
        chart.draw_series(line).map_err(problem)?;
    }
    let how = match (&run.outcome, measured.total) {
        (Outcome::Moved, Some(total)) => format!("total {} s", number(total)),
        (Outcome::Moved, None) => "moved".to_owned(),
        (Outcome::NotFinished { .. }, _) => "NOT FINISHED".to_owned(),
        (Outcome::Failed { .. }, _) => "FAILED".to_owned(),
    };
    let text = format!(
        "{}: downtime {} s, lost work {} s, {how}",
        run.engine,
        number(measured.downtime),
        number(measured.lost_work)
    );
    write(area, &text, (40, 3), 12, color)
}
