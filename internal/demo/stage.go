package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/dchannel/dchannel/backend/memory"
	"github.com/dchannel/dchannel/internal/faultproxy"
	"github.com/dchannel/dchannel/internal/testserver"
)

// stage is where the demo plays: a server, and what cuts the connections to it.
type stage struct {
	p      plan
	store  *memory.Store // on memory
	here   []*memory.Backend
	server *testserver.Server // else
	proxy  *faultproxy.Proxy
	actors []*actor
}

func newStage(ctx context.Context, p plan) (*stage, error) {
	st := &stage{p: p}
	if p.backend == "memory" {
		st.store = memory.NewStore()
		return st, nil
	}
	d, ok := drivers[p.backend]
	if !ok {
		return nil, fmt.Errorf("-backend %q: want memory, %s", p.backend, driverNames())
	}
	var err error
	if st.server, err = d.start(ctx); err != nil {
		return nil, err
	}
	if st.proxy, err = faultproxy.New(st.server.Addr()); err != nil {
		st.close()
		return nil, err
	}
	return st, nil
}

func (st *stage) describe() string {
	if st.store != nil {
		return "backend memory: every process is a goroutine with a backend of its own on one store"
	}
	return fmt.Sprintf("backend %s: a real server (process %d), every participant a process of its own, "+
		"their connections through a proxy that cuts them", st.p.backend, st.server.PID())
}

func (st *stage) close() {
	for _, a := range st.actors {
		a.stop()
	}
	if st.proxy != nil {
		_ = st.proxy.Close()
	}
	if st.server != nil {
		_ = st.server.Close()
	}
}

// keepCutting cuts all connections every now and then.
func (st *stage) keepCutting(ctx context.Context) {
	for n := 1; ; n++ {
		select {
		case <-time.After(100*time.Millisecond + rand.N(300*time.Millisecond)): //nolint:gosec // pace
		case <-ctx.Done():
			return
		}
		cut := 0
		if st.store != nil {
			for _, b := range st.here {
				b.Cut(errors.New("the demo cut it"))
				cut++
			}
			<-time.After(20 * time.Millisecond)
			for _, b := range st.here {
				b.Heal()
			}
		} else {
			cut = st.proxy.Cut()
		}
		fmt.Printf("  cut %d: %d connections\n", n, cut)
	}
}

// actor is a process, or what stands for one.
type actor struct {
	name    string
	isReady chan struct{}
	wait    chan struct{} // closed by goOn
	result  chan report   // 1 buffered
	stdin   io.Writer
	stop    func()
}

func (st *stage) start(ctx context.Context, role, name string) *actor {
	a := &actor{name: name, isReady: make(chan struct{}), wait: make(chan struct{}), result: make(chan report, 1)}
	ctx, cancel := context.WithCancel(ctx)
	a.stop = cancel
	st.actors = append(st.actors, a)
	if st.store != nil {
		b := st.store.Backend()
		st.here = append(st.here, b)
		go func() {
			defer b.Close()
			a.result <- act(ctx, b, st.p, role, name, cue{ready: func() { close(a.isReady) }, wait: a.wait})
		}()
		return a
	}
	if err := st.spawn(ctx, a, role); err != nil {
		a.result <- report{Name: name, Error: err.Error()}
	}
	return a
}

// spawn starts a as a process of the operating system: this program, with a role.
func (st *stage) spawn(ctx context.Context, a *actor, role string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, "-role", role, "-name", a.name, "-addr", st.proxy.Addr(), //nolint:gosec // ourselves
		"-backend", st.p.backend, "-messages", strconv.Itoa(st.p.messages), "-pace", st.p.pace.String())
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	a.stdin = in
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() {
		r := report{Name: a.name, Error: "ended without a report"}
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			if lines.Text() == readyLine {
				close(a.isReady)
				continue
			}
			r = report{}
			if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
				r.Error = fmt.Sprintf("said %q", lines.Text())
			}
		}
		_ = cmd.Wait() // the report says how it went
		a.result <- r
	}()
	return nil
}

func (a *actor) ready(ctx context.Context) error {
	select {
	case <-a.isReady:
		return nil
	case r := <-a.result:
		return fmt.Errorf("%s: %s", a.name, r.Error)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (a *actor) goOn() {
	close(a.wait)
	if a.stdin != nil {
		_, _ = io.WriteString(a.stdin, "\n") // if it is gone, its report tells
	}
}

func (a *actor) report(ctx context.Context) (report, error) {
	select {
	case r := <-a.result:
		if r.Error != "" {
			return r, fmt.Errorf("%s: %s", a.name, r.Error)
		}
		return r, nil
	case <-ctx.Done():
		return report{}, fmt.Errorf("%s: %w", a.name, ctx.Err())
	}
}

const readyLine = "ready"

// runChild is a process of the demo: it talks in lines on its standard streams.
func runChild(ctx context.Context, p plan, role, name, addr string) error {
	d, ok := drivers[p.backend]
	if !ok {
		return fmt.Errorf("-backend %q: want %s", p.backend, driverNames())
	}
	b, stop, err := d.connect(ctx, addr)
	if err != nil {
		return err
	}
	defer stop()
	wait := make(chan struct{})
	go func() {
		_, _ = bufio.NewReader(os.Stdin).ReadString('\n')
		close(wait)
	}()
	r := act(ctx, b, p, role, name, cue{ready: func() { fmt.Println(readyLine) }, wait: wait})
	return json.NewEncoder(os.Stdout).Encode(r)
}

func driverNames() string {
	var names []string
	for name := range drivers {
		names = append(names, name)
	}
	return strings.Join(names, ", ")
}
