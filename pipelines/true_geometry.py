"""Draw docs/images/true_geometry.png: geometry per frame and view in one coordinate system, from a simulator's cameras.

    MUJOCO_GL=osmesa python pipelines/true_geometry.py

Nothing here is estimated: `geomcache.simulator.oracle` says how. Depth Anything 3 estimates the same from pictures
alone, on an arbitrary scale.

The picture is drawn only when the geometry agrees with the pictures: `check` says how that is seen.

Legend of shapes:  V views   h, w cells
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from geomcache.look.drawing import AXIS_COLOURS, house_style, limits_of, scalar_colours, vector_colours
from geomcache.look.pinhole import fit_pinhole
from geomcache.simulator import libero
from geomcache.simulator.oracle import MIRROR, camera_pose, in_first_view, metres, views_of
from geomcache.simulator.oracle import View as Place

SUITE, TASK = "libero_spatial", 0
CAMERAS = ("agentview", "robot0_eye_in_hand")
OBJECT = "akita_black_bowl_1_main"
SIZE, CELLS = 576, 288  # pixels and cells a side: 8 rays for each 14-pixel patch at 504 px, DA3's native grid
MOVES = ((0.0, 0.0, 0.0),) * 10 + ((0.0, 0.45, 0.0),) * 12  # of the hand, so that the wrist camera sees the bowls
COLOURS = ("#1565c0", "#e65100")  # of the views
LABELS = ("agentview", "wrist")
ORIGIN_LIMITS = np.array([(-1.0,) * 3, (1.0,) * 3])  # metres, for x, y, z
DEPTH_LIMITS = np.array([0.3, 2.0])  # metres
MARKED = (
    (9, 41),
    (5, 80),
    (32, 77),
    (57, 74),
    (63, 12),
    (38, 42),
)  # on objects in the wrist's picture: row, column in %
FRUSTUM = 0.16  # metres along the axis
OUTPUT = Path(__file__).parents[1] / "docs" / "images" / "true_geometry.png"


@dataclass(frozen=True, kw_only=True)
class View:
    """What one camera sees, and where it is."""

    name: str
    picture: NDArray[np.uint8]  # [SIZE, SIZE, 3] as in LeRobot's LIBERO datasets
    depth: NDArray[np.float64]  # [h, w] metres along the optical axis
    ray: NDArray[np.float64]  # [h, w, 6] direction and origin, in the first view's coordinates
    place: Place

    @property
    def origin(self) -> NDArray[np.float64]:
        """The camera's place [3]."""
        return self.place.origin

    @property
    def points(self) -> NDArray[np.float64]:
        """Points [h, w, 3] that the cells see."""
        points: NDArray[np.float64] = self.ray[..., 3:] + self.depth[..., None] * self.ray[..., :3]
        return points

    def project(self, points: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the cells [n, 2] (column, row; fractions) and depths [n] of points [n, 3]."""
        places, depth = self.place.project(points)
        return (places + 1) / 2 * CELLS - 0.5, depth


def make_environment() -> Any:
    """Return LIBERO's environment, its hand moved to where both cameras see the bowls."""
    package = libero.find_package()
    libero.write_config(package)
    libero.provide_assets(package)
    libero.choose_renderer()
    from libero.libero import get_libero_path
    from libero.libero.benchmark import get_benchmark_dict
    from libero.libero.envs import OffScreenRenderEnv

    task = get_benchmark_dict()[SUITE]().get_task(TASK)
    file = Path(get_libero_path("bddl_files")) / task.problem_folder / task.bddl_file
    environment = OffScreenRenderEnv(bddl_file_name=str(file), camera_heights=32, camera_widths=32)
    environment.seed(0)
    environment.reset()
    for move in MOVES:
        environment.step([*move, 0.0, 0.0, 0.0, -1.0])
    return environment


def render(simulation: Any, name: str) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Return a camera's picture [SIZE, SIZE, 3] and depth [h, w] in metres, both mirrored as LeRobot's pictures."""
    picture, _ = simulation.render(camera_name=name, width=SIZE, height=SIZE, depth=True)
    _, buffer = simulation.render(camera_name=name, width=CELLS, height=CELLS, depth=True)
    return np.ascontiguousarray(picture[::-1, ::-1]), metres(simulation, buffer)  # OpenGL begins at the bottom


def up_in_first_view(simulation: Any) -> NDArray[np.float64]:
    """Return the world's up direction [3] in the first view's coordinates."""
    up: NDArray[np.float64] = MIRROR @ camera_pose(simulation, CAMERAS[0])[2, :3]
    return up


def see(simulation: Any) -> list[View]:
    """Render the cameras and work out their rays."""
    views = []
    for name, place in zip(CAMERAS, views_of(simulation, CAMERAS), strict=True):
        picture, depth = render(simulation, name)
        views.append(View(name=name, picture=picture, depth=depth, ray=place.rays((CELLS, CELLS)), place=place))
    return views


def check(simulation: Any, views: list[View]) -> None:
    """See that the geometry is that of the pictures. Prints what was measured.

    1. An object's position in the simulator, projected into a view, lies among the pixels that change when the
       object is made invisible, in both views.
    2. Points of one view that another sees have the depth there that the other's own depth map says.
    3. A camera fitted to the rays alone has the simulator's field of view and origin.
    """
    data, model = simulation.data, simulation.model
    body = model.body_name2id(OBJECT)
    centres = in_first_view(simulation, CAMERAS[0], np.array([data.xpos[body]]))
    colours = model.geom_rgba.copy()
    model.geom_rgba[model.geom_bodyid == body, 3] = 0.0
    for view in views:
        _, without = render(simulation, view.name)
        mask = np.abs(without - view.depth) > 1e-3
        (cell,), _ = view.project(centres)
        distance = np.hypot(*(np.argwhere(mask)[:, ::-1] - cell).T).min()
        print(f"{view.name}: {OBJECT} at cell {cell.round(1)}, {mask.sum()} cells show it, nearest {distance:.1f} away")
        if distance > 1.0:
            raise RuntimeError(
                f"{view.name}: expected {OBJECT} at cell {cell.round(1)}, it is {distance:.1f} cells away"
            )
        fitted = fit_pinhole(view.ray, None)
        np.testing.assert_allclose(fitted.origin, view.origin, atol=1e-9)
        np.testing.assert_allclose(np.tan(np.radians(fitted.fields_of_view) / 2), view.place.tangents, rtol=1e-9)
    model.geom_rgba[:] = colours
    for one, other in (views, views[::-1]):
        cells, depth = other.project(one.points.reshape(-1, 3))
        column, row = np.rint(cells).astype(int).T
        inside = (depth > 0) & (column >= 0) & (column < CELLS) & (row >= 0) & (row < CELLS)
        error = np.abs(other.depth[row[inside], column[inside]] / depth[inside] - 1)
        print(f"{one.name} in {other.name}: {inside.sum()} points, median depth error {np.median(error):.2%}")
        if np.median(error) > 0.01:
            raise RuntimeError(
                f"{one.name} in {other.name}: expected the same depth, median error {np.median(error):.1%}"
            )


def shared_points(views: list[View]) -> NDArray[np.float64]:
    """Return points [n, 3] that both views see: those of `MARKED` that the first view has at that depth."""
    first, second = views
    rows, columns = (np.array(MARKED) * CELLS // 100).T
    points = second.points[rows, columns]
    cells, depth = first.project(points)
    column, row = np.rint(cells).astype(int).T.clip(0, CELLS - 1)
    seen: NDArray[np.float64] = points[np.abs(first.depth[row, column] / depth - 1) < 0.01]
    return seen


def compose(views: list[View], up: NDArray[np.float64]) -> Figure:
    """Draw the picture: the maps of both views, and the scene that they describe."""
    figure = Figure((15.2, 6.2), dpi=100, facecolor="white")
    grid = figure.add_gridspec(
        3, 5, left=0.024, right=0.995, top=0.87, bottom=0.065, wspace=0.05, hspace=0.06,
        width_ratios=(1, 1, 1, 1, 2.2), height_ratios=(1, 1, 0.04),
    )  # fmt: skip
    rays, depths = (np.stack([getattr(view, name) for view in views]) for name in ("ray", "depth"))
    limits = {"direction": limits_of(rays[..., :3]), "origin": ORIGIN_LIMITS, "depth": DEPTH_LIMITS}
    maps = {
        "ray direction": vector_colours(rays[..., :3], limits["direction"]),
        "ray origin": vector_colours(rays[..., 3:], limits["origin"]),
        "depth": scalar_colours(depths, limits["depth"]),
    }
    points = shared_points(views)
    for number, view in enumerate(views):
        panels = {"picture": view.picture, **{name: colours[number] for name, colours in maps.items()}}
        for column, (name, pixels) in enumerate(panels.items()):
            axes = figure.add_subplot(grid[number, column])
            axes.imshow(pixels, extent=(-0.5, CELLS - 0.5, CELLS - 0.5, -0.5))
            axes.set(xticks=[], yticks=[])
            if number == 0:
                axes.set_title(f"{name} [m]" if name in ("ray origin", "depth") else name, size=13)
            if name == "picture":
                axes.set_ylabel(f"view {number}: {LABELS[number]}", size=13, color=COLOURS[number])
                for spine in axes.spines.values():
                    spine.set(color=COLOURS[number], linewidth=3)
                cells, _ = view.project(points)
                axes.scatter(
                    cells[:, 0],
                    cells[:, 1],
                    c=point_colours(points),
                    s=42,
                    edgecolors="white",
                    linewidths=1.2,
                    clip_on=False,
                )
            if name == "ray origin":
                words = "\n".join(
                    f"{axis} = {value + 0.0:.2f} m" for axis, value in zip("xyz", view.origin.round(2), strict=True)
                )
                axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", size=12, color="white")
    draw_bars(figure, grid, limits)
    draw_space(figure, grid[:, 4], views, points, up)
    figure.text(0.007, 0.95, "Geometry per frame and per view, in one coordinate system", size=17, weight="bold")
    words = "point = origin + depth · direction\nboth views' rays to a marked point meet there"
    figure.text(0.83, 0.81, words, size=12.5, ha="center", linespacing=1.5)
    note = "Ground truth of the LIBERO simulator, not a network's output"
    figure.text(0.993, 0.952, note, size=12, color="#616161", ha="right")
    return figure


def point_colours(points: NDArray[np.float64]) -> list[Any]:
    """Return a colour for each shared point."""
    return [colormaps["tab10"](number % 10) for number in range(len(points))]


def draw_bars(figure: Figure, grid: Any, limits: dict[str, NDArray[np.float64]]) -> None:
    """Draw what the colours mean, below the maps."""
    for column, name in ((1, "direction"), (2, "origin")):
        for axis, letter in enumerate("xyz"):
            part = grid[2, column].subgridspec(1, 3, wspace=0.12)[axis]
            colours = np.zeros((1, 256, 3), np.uint8)
            colours[..., axis] = np.arange(256)
            low, high = limits[name][:, axis]
            bar = draw_bar(figure.add_subplot(part), colours, (f"{low:.1f}", f"{high:.1f}"))
            bar.text(127, 0, letter, color="white", ha="center", va="center", size=10)
    low, high = limits["depth"]
    depths = scalar_colours(np.geomspace(low, high, 256)[None], limits["depth"])
    draw_bar(figure.add_subplot(grid[2, 3]), depths, (f"{low:.1f}", f"{np.sqrt(low * high):.1f}", f"{high:.1f}"))


def draw_bar(axes: Axes, colours: NDArray[np.uint8], labels: tuple[str, ...]) -> Axes:
    """Draw one colour bar [1, 256, 3] with labels from its left to its right end."""
    axes.imshow(colours, aspect="auto")
    axes.set_yticks([])
    axes.set_xticks(np.linspace(0, 255, len(labels)), labels, size=9.5)
    axes.tick_params(length=0)
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    axes.get_xticklabels()[-1].set_horizontalalignment("right")
    return axes


def draw_space(
    figure: Figure, place: Any, views: list[View], points: NDArray[np.float64], up: NDArray[np.float64]
) -> None:
    """Draw what both views see as points, their cameras' frusta, and both cameras' rays to the shared points."""
    axes = figure.add_subplot(place, projection="3d", computed_zorder=False)
    axes.set_axis_off()
    axes.set_position((0.655, 0.0, 0.345, 0.93))
    ahead = np.array([0.0, 0.0, 1.0]) - up[2] * up
    ahead /= np.linalg.norm(ahead)
    upright = np.stack([np.cross(ahead, up), ahead, up], axis=1)  # columns: right, ahead, up
    for number, view in enumerate(views):
        colours = np.asarray(Image.fromarray(view.picture).resize((CELLS, CELLS), Image.Resampling.BOX))
        near = (view.points[..., 2] < 1.75) & (view.depth > 0.2)
        axes.scatter(*(view.points[near] @ upright).T, c=colours[near] / 255, s=1.6, linewidths=0, depthshade=False)
        corners = view.origin + FRUSTUM * view.ray[[0, 0, -1, -1], [0, -1, -1, 0], :3]
        for corner, following in zip(corners, np.roll(corners, -1, axis=0), strict=True):
            lines = np.stack([view.origin, corner, following]) @ upright
            axes.plot(*lines.T, color=COLOURS[number], linewidth=2.2, zorder=5)
        for point in points:
            line = np.stack([view.origin, point]) @ upright
            axes.plot(*line.T, color=COLOURS[number], linewidth=0.9, alpha=0.8, zorder=4)
        axes.text(*((view.origin + 0.1 * up) @ upright), f"view {number}", color=COLOURS[number], size=12, zorder=8)
    for axis, colour in enumerate(AXIS_COLOURS):
        line = np.stack([np.zeros(3), 0.22 * np.eye(3)[axis]]) @ upright
        axes.plot(*line.T, color=colour, linewidth=3, zorder=6)
        axes.text(*(0.27 * np.eye(3)[axis] @ upright), "xyz"[axis], color=colour, size=12, weight="bold", zorder=8)
    axes.scatter(*(points @ upright).T, c=point_colours(points), s=42, edgecolors="white", depthshade=False, zorder=7)
    axes.set(xlim=(-0.74, 0.56), ylim=(0.1, 1.4), zlim=(-1.05, 0.25))
    axes.set_box_aspect((1, 1, 1), zoom=1.5)
    axes.view_init(elev=24, azim=-36)


def main() -> None:
    """Render, check and draw."""
    parser = argparse.ArgumentParser(description="Draw docs/images/true_geometry.png from LIBERO's own cameras.")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    environment = make_environment()
    simulation = environment.env.sim
    views = see(simulation)
    check(simulation, views)
    with house_style():
        compose(views, up_in_first_view(simulation)).savefig(arguments.output, dpi=110)
    print(f"{arguments.output}: {arguments.output.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
