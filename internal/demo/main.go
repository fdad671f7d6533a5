// Command demo shows the main job: several processes share one channel, are cut off
// and come back, and are all told when somebody closes it. At the end it checks that
// nobody missed anything.
//
//	go run ./internal/demo -backend memory|redis|nats|etcd
//
// On memory the processes are goroutines with a backend each; on the others they are
// processes of the operating system, on a real server that the demo starts, behind a
// proxy that cuts their connections.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"time"
)

const (
	channel    = "orders"
	listeners  = 3
	publishers = 2
)

func main() {
	var p plan
	flag.StringVar(&p.backend, "backend", "memory", "memory, redis, nats or etcd")
	flag.IntVar(&p.messages, "messages", 2000, "how many messages each publisher sends")
	flag.DurationVar(&p.pace, "pace", time.Millisecond, "the time between two messages of a publisher")
	role := flag.String("role", "", "what this process does (set by the demo itself)")
	name := flag.String("name", "", "this process's name (set by the demo itself)")
	addr := flag.String("addr", "", "the server's address (set by the demo itself)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()

	var err error
	switch {
	case flag.NArg() > 0:
		err = fmt.Errorf("unexpected argument %q", flag.Arg(0))
	case p.messages < 1:
		err = fmt.Errorf("-messages %d: want at least 1", p.messages)
	case *role != "":
		err = runChild(ctx, p, *role, *name, *addr)
	default:
		err = run(ctx, p)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

type plan struct {
	backend  string
	messages int
	pace     time.Duration
}

// run is the story, from the point of view of who watches.
func run(ctx context.Context, p plan) error {
	st, err := newStage(ctx, p)
	if err != nil {
		return err
	}
	defer st.close()
	fmt.Printf("%s\n\n", st.describe())

	var ls, ps []*actor
	for i := range listeners {
		ls = append(ls, st.start(ctx, roleListen, fmt.Sprintf("listener-%d", i+1)))
	}
	for i := range publishers {
		ps = append(ps, st.start(ctx, rolePublish, fmt.Sprintf("publisher-%d", i+1)))
	}
	for _, a := range append(ls[:len(ls):len(ls)], ps...) {
		if err := a.ready(ctx); err != nil {
			return err
		}
	}
	fmt.Printf("%d listeners are attached to %q, %d publishers begin: %d messages each\n",
		listeners, channel, publishers, p.messages)
	for _, a := range ps {
		a.goOn()
	}
	cutting, stopCutting := context.WithCancel(ctx)
	cut := make(chan struct{})
	go func() {
		defer close(cut)
		st.keepCutting(cutting)
	}()
	var reports []report
	for _, a := range ps {
		r, err := a.report(ctx)
		if err != nil {
			stopCutting()
			<-cut
			return err
		}
		reports = append(reports, r)
	}
	stopCutting()
	<-cut
	for _, r := range reports {
		fmt.Printf("  %-12s published %d, all accepted\n", r.Name, r.Count)
	}

	closer := st.start(ctx, roleClose, "closer")
	if _, err := closer.report(ctx); err != nil {
		return err
	}
	fmt.Println("closer        closed the channel, for everyone")
	reports = reports[:0]
	for _, a := range ls {
		r, err := a.report(ctx)
		if err != nil {
			return err
		}
		reports = append(reports, r)
		fmt.Printf("  %-12s %d messages, %d lost, %d times cut off and back, order %s, then: channel closed\n",
			r.Name, r.Count, r.Lost, r.Reconnects, r.Order)
	}
	late, err := st.start(ctx, roleLate, "latecomer").report(ctx)
	if err != nil {
		return err
	}
	fmt.Printf("  %-12s attached after the close: closed is %t; read %d retained messages, order %s, then: channel closed\n",
		late.Name, late.Closed, late.Count, late.Order)

	return check(p, append(reports, late))
}

// check is strict: every listener has every message, once, in the same order.
func check(p plan, reports []report) error {
	want := publishers * p.messages
	var errs []error
	for _, r := range reports {
		if r.Count != want || r.Lost != 0 || r.Wrong != 0 {
			errs = append(errs, fmt.Errorf("%s: %d messages of %d, %d reported lost, %d out of their publisher's order",
				r.Name, r.Count, want, r.Lost, r.Wrong))
		}
		if r.Order != reports[0].Order {
			errs = append(errs, fmt.Errorf("%s saw another order than %s", r.Name, reports[0].Name))
		}
		if !r.Closed {
			errs = append(errs, fmt.Errorf("%s was not told of the close", r.Name))
		}
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	fmt.Printf("\nchecked: %d messages for each of %d listeners, none lost, none twice, one order, one close\n",
		want, len(reports))
	return nil
}
