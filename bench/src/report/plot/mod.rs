//! Plots as SVG. What the kinds of plots share stands here: colours, canvas, text; each kind has a file.

mod bytes;
mod downtime;
mod faults;
mod speed;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;

use super::cells::Results;
use crate::engine;

/// Name and text of every plot.
pub fn all(results: &Results<'_>) -> Result<Vec<(String, String)>> {
    let mut plots = speed::plots(results)?;
    plots.extend(downtime::plots(results)?);
    plots.extend(faults::plots(results)?);
    plots.extend(bytes::plots(results)?);
    Ok(plots)
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws into a text. Plotters' errors borrow what they draw on: they go on as text.
pub(crate) fn draw(
    width: u32,
    height: u32,
    paint: impl FnOnce(&Area<'_>) -> Result<()>,
) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (width, height)).into_drawing_area();
        area.fill(&WHITE).map_err(problem)?;
        paint(&area)?;
        area.present().map_err(problem)?;
    }
    Ok(svg)
}

pub(crate) fn problem(error: impl std::fmt::Display) -> anyhow::Error {
    anyhow!("a plot cannot be drawn: {error}")
}

/// Writes a line of text with its upper left corner at `at`.
pub(crate) fn write(
    area: &Area<'_>,
    text: &str,
    at: (i32, i32),
    size: i32,
    color: RGBColor,
) -> Result<()> {
    let style = ("sans-serif", size).into_font().color(&color);
    area.draw(&Text::new(text.to_owned(), at, style))
        .map_err(problem)
}

/// Text that is not a figure.
pub(crate) const INK: RGBColor = RGBColor(60, 60, 60);
/// Lines that only guide the eye.
pub(crate) const FAINT: RGBColor = RGBColor(225, 225, 225);

/// Shades of blue for hybridmig, warm and green ones for the others, the same in every plot.
fn color(engine: &str) -> RGBColor {
    const OURS: [RGBColor; 3] = [
        RGBColor(8, 69, 148),
        RGBColor(49, 130, 189),
        RGBColor(123, 179, 217),
    ];
    const THEIRS: [RGBColor; 12] = [
        RGBColor(214, 39, 40),
        RGBColor(255, 152, 150),
        RGBColor(230, 119, 0),
        RGBColor(253, 174, 97),
        RGBColor(35, 139, 69),
        RGBColor(140, 200, 120),
        RGBColor(117, 107, 177),
        RGBColor(188, 170, 214),
        RGBColor(140, 86, 75),
        RGBColor(196, 156, 148),
        RGBColor(90, 90, 90),
        RGBColor(170, 170, 170),
    ];
    let mut places = (0, 0);
    for known in engine::all() {
        let ours = known.name().starts_with("hybridmig");
        if known.name() == engine {
            return if ours {
                OURS[places.0 % OURS.len()]
            } else {
                THEIRS[places.1 % THEIRS.len()]
            };
        }
        if ours {
            places.0 += 1;
        } else {
            places.1 += 1;
        }
    }
    BLACK
}

/// Draws a legend of engines and returns its height.
fn legend(area: &Area<'_>, engines: &[&str], at: (i32, i32)) -> Result<i32> {
    const LINE: i32 = 16;
    for (index, engine) in engines.iter().enumerate() {
        let y = at.1 + index as i32 * LINE;
        let mark = Rectangle::new([(at.0, y + 2), (at.0 + 12, y + 11)], color(engine).filled());
        area.draw(&mark).map_err(problem)?;
        write(area, engine, (at.0 + 18, y), 12, INK)?;
    }
    Ok(engines.len() as i32 * LINE)
}
