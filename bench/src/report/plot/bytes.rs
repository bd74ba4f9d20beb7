//! What an engine says that it sent in each phase, beside what the emulator counted in both directions. A plot
//! for each guest, a panel for each link, a bar for each engine.

use anyhow::Result;
use plotters::prelude::*;

use super::{Area, FAINT, INK, draw, problem, write};
use crate::report::cells::{Cell, Metric, Results, claimed_phases, slug};

const WIDTH: u32 = 960;
const BAR: u32 = 20;
const HEAD: u32 = 52;
const PANEL_HEAD: u32 = 60;
const PHASES: [(&str, RGBColor); 3] = [
    ("pre-copy", RGBColor(158, 202, 225)),
    ("freeze-copy", RGBColor(230, 119, 0)),
    ("post-copy", RGBColor(49, 130, 189)),
];

pub fn plots(results: &Results<'_>) -> Result<Vec<(String, String)>> {
    let mut plots = Vec::new();
    for guest in results.guests() {
        let of_guest = results
            .cells
            .iter()
            .filter(|cell| cell.any.guest.name == guest);
        let cells: Vec<_> = of_guest.collect();
        plots.push((
            format!("bytes-by-phase-{}.svg", slug(guest)),
            plot(guest, &cells)?,
        ));
    }
    Ok(plots)
}

fn height(cell: &Cell<'_>) -> u32 {
    BAR * cell.rows.len() as u32 + PANEL_HEAD
}

fn plot(guest: &str, cells: &[&Cell<'_>]) -> Result<String> {
    let all = HEAD + cells.iter().map(|cell| height(cell)).sum::<u32>();
    draw(WIDTH, all, |area| {
        write(
            area,
            &format!("Megabytes by phase: {guest}"),
            (12, 8),
            16,
            INK,
        )?;
        let mut left = 12;
        for (name, color) in PHASES {
            let mark = Rectangle::new([(left, 33), (left + 12, 43)], color.filled());
            area.draw(&mark).map_err(problem)?;
            write(area, name, (left + 18, 31), 12, INK)?;
            left += 110;
        }
        let key =
            "by the engine's own word; | on the wire in both directions, as the emulator counted";
        write(area, key, (left, 31), 12, INK)?;
        let (_, mut rest) = area.split_vertically(HEAD);
        for cell in cells {
            let (panel, below) = rest.split_vertically(height(cell));
            paint(&panel, cell)?;
            rest = below;
        }
        Ok(())
    })
}

fn paint(area: &Area<'_>, cell: &Cell<'_>) -> Result<()> {
    let rows: Vec<_> = cell
        .rows
        .iter()
        .filter_map(|row| {
            let run = row.typical().or(row.runs.first().copied())?;
            let phases = claimed_phases(&run.claimed).unwrap_or_default();
            let wire = Metric::Wire.of(run).unwrap_or_default();
            Some((row, phases, wire))
        })
        .collect();
    let longest = |(_, phases, wire): &(_, [f64; 3], f64)| phases.iter().sum::<f64>().max(*wire);
    let most = rows.iter().map(longest).fold(1.0, f64::max);
    let count = rows.len() as f64;
    let mut chart = ChartBuilder::on(area)
        .caption(
            cell.any.link_facts.to_string(),
            ("sans-serif", 13).into_font().color(&INK),
        )
        .margin_right(20)
        .margin_left(8)
        .y_label_area_size(240)
        .x_label_area_size(26)
        .build_cartesian_2d(0.0..most * 1.05, 0.0..count)
        .map_err(problem)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .label_style(("sans-serif", 11))
        .y_labels(0)
        .draw()
        .map_err(problem)?;
    for (index, (row, phases, wire)) in rows.iter().enumerate() {
        let (low, high) = (count - index as f64 - 0.85, count - index as f64 - 0.15);
        let mut from = 0.0;
        for (megabytes, (_, color)) in phases.iter().zip(PHASES) {
            let bar = Rectangle::new([(from, low), (from + megabytes, high)], color.filled());
            chart.draw_series([bar]).map_err(problem)?;
            from += megabytes;
        }
        let mark = LineSeries::new(
            [(*wire, low - 0.1), (*wire, high + 0.1)],
            BLACK.stroke_width(2),
        );
        chart.draw_series(mark).map_err(problem)?;
        let base = area.get_base_pixel();
        let at = chart.backend_coord(&(0.0, f64::midpoint(low, high)));
        let stayed = if row.moved().count() == 0 {
            " (not moved)"
        } else {
            ""
        };
        let text = format!("{}{stayed}", row.engine);
        write(area, &text, (14, at.1 - base.1 - 6), 11, INK)?;
    }
    Ok(())
}
